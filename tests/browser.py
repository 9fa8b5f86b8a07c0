"""A real browser: Debian's Chromium, headless, by its own driver."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus import program
from selenium.webdriver import Chrome, ChromeOptions, ChromeService


class Browser(Chrome):
    """Chrome's driver, with what its protocol offers besides."""

    def show(self, path: Path, *, width: int = 1100, dark: bool = False) -> None:
        """Open a file as a screen of this width shows it."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.prefer("dark" if dark else "light")
        self.get(path.as_uri())

    def prefer(self, scheme: str, medium: str = "") -> None:
        """What the reader's system prefers, and whether the page is on a screen or printed."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})

    def picture(self, height: float | None = None, top: float = 0) -> bytes:
        """A PNG of the page, or of a part of it."""
        box = self.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": top, "width": box["width"], "height": height or box["height"] - top}
        options = {"captureBeyondViewport": True, "clip": clip | {"scale": 1}}
        return base64.b64decode(self.execute_cdp_cmd("Page.captureScreenshot", options)["data"])

    def requests(self) -> list[str]:
        """What the page asked for since the last call, itself included."""
        events = (json.loads(entry["message"])["message"] for entry in self.get_log("performance"))
        sent: dict[str, str] = {}
        for event in events:
            what, about = event["method"], event["params"]
            if what == "Network.requestWillBeSent":
                sent[about["requestId"]] = about["request"]["url"]
            elif what == "Network.loadingFailed" and about.get("blockedReason") == "csp":
                del sent[about["requestId"]]  # it was held back before it left
        return list(sent.values())

    def complaints(self) -> list[str]:
        """What it wrote to the console since the last call."""
        return [entry["message"] for entry in self.get_log("browser")]

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader is told of."""
        nodes = self.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    options = ChromeOptions()
    for argument in (
        "headless=new",
        "no-sandbox",  # tests may run as root
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Browser(options=options, service=ChromeService(program("chromedriver")))
    # The driver's own 30 seconds are too few for axe on a slow machine.
    browser.set_script_timeout(300)
    try:
        browser.get("about:blank")
        browser.requests()  # the start page's own
        yield browser
    finally:
        browser.quit()
