
"use strict";
// The page is whole without this: it adds reading cells by key, and sorting.

// Heat maps: one stop of the Tab key each; the arrow keys move over the cells.
for (const map of document.querySelectorAll("svg:has([data-row])")) {
  const frame = map.parentElement, said = document.createElement("output");
  const cells = new Map(), at = (row, column) => cells.get(`${row},${column}`);
  for (const cell of map.querySelectorAll("[data-row]")) {
    cells.set(`${cell.dataset.row},${cell.dataset.column}`, cell);
  }
  const last = { row: 0, column: 0 };
  for (const { dataset } of cells.values()) {
    last.row = Math.max(last.row, dataset.row);
    last.column = Math.max(last.column, dataset.column);
  }
  frame.after(said);
  frame.setAttribute("role", "application");
  frame.setAttribute("aria-label", `${map.getAttribute("aria-label")} Arrow keys move.`);
  frame.tabIndex = 0;
  let here = null;
  const show = (cell) => {
    here?.classList.remove("here");
    here = cell;
    here.classList.add("here");
    here.parentElement.append(here);  // or its neighbours would cover its outline
    here.scrollIntoView({ block: "nearest", inline: "nearest" });
    said.textContent = here.querySelector("title").textContent;
  };
  frame.addEventListener("focus", () => show(here ?? cells.values().next().value));
  frame.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in step)) return;
    event.preventDefault();
    const [down, across] = step[event.key];
    let [row, column] = [+here.dataset.row, +here.dataset.column], next;
    do {  // over what is not there, to the next that is
      [row, column] = [row + down, column + across];
      next = at(row, column);
    } while (!next && Math.min(row, column) >= 0 && row <= last.row && column <= last.column);
    if (next) show(next);
  });
  map.addEventListener("pointerover", (event) => {
    if (event.target.matches("[data-row]")) show(event.target);
  });
}

// What is wider than the page scrolls; where a browser does not let the keyboard do so, this does.
for (const frame of document.querySelectorAll(".scroll:not([tabindex])")) {
  if (frame.scrollWidth > frame.clientWidth && !frame.querySelector("a, button")) {
    frame.tabIndex = 0;
  }
}

// Tables: a click on a column's name sorts by it, another one the other way.
for (const table of document.querySelectorAll("table.sortable")) {
  const head = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  head.forEach((name, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...name.childNodes);
    name.append(button);
    button.addEventListener("click", () => {
      const down = name.ariaSort !== "ascending";
      head.forEach((other) => other.removeAttribute("aria-sort"));
      name.setAttribute("aria-sort", down ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent;
      const order = (a, b) => {
        const [x, y] = [parseFloat(text(a)), parseFloat(text(b))];
        const byText = Number.isNaN(x) || Number.isNaN(y);
        return byText ? text(a).localeCompare(text(b), "en", { numeric: true }) : x - y;
      };
      const rows = [...body.rows].sort(order);
      body.append(...(down ? rows : rows.reverse()));
    });
  });
}
