"""``enchtable vector sign``, and what ``vector verify`` says of signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from enchtable_vllm.checkpoint import Location, locate, short
from enchtable_vllm.cli.options import JsonOption
from enchtable_vllm.cli.output import out, print_json, progress_bar, say
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.signing import SIGNATURE_FILE, check_folder, parse_requirement, read_signature
from enchtable_vllm.signing.sign import (
    CertificateSigner,
    KeySigner,
    Signed,
    SigstoreSigner,
    sign_vector,
)
from enchtable_vllm.vector import SafetyVector

RequireSignatureOption = Annotated[
    str | None,
    typer.Option(
        help="Who must have signed: a public key's path, or the loader's 'require_signature' "
        "object as JSON.",
        show_default=False,
    ),
]


def sign(
    vector: Annotated[Path, typer.Argument(help="The vector's folder.")],
    private_key: Annotated[
        Path | None, typer.Option(help="PEM, ECDSA on P-256, P-384 or P-521.", show_default=False)
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(help="Holds the key's password.", show_default=False)
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM, of the key's public half.", show_default=False)
    ] = None,
    certificate_chain: Annotated[
        list[Path] | None,
        typer.Option(help="PEM, what vouches for it; may be repeated.", show_default=False),
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign as a CI job or a person, without a key.")
    ] = False,
    identity_token_file: Annotated[
        Path | None, typer.Option(help="Holds an OpenID Connect token.", show_default=False)
    ] = None,
    trust_config: Annotated[
        Path | None, typer.Option(help="Of a Sigstore of your own.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a vector's folder, its plans with it, for servers that demand it.

    Every byte is checked first, and plans of another vector are refused. What is added or changed
    afterwards, a plan too, is signed by signing again.
    """
    signer = _signer(
        private_key,
        password_file,
        certificate,
        certificate_chain or [],
        sigstore,
        identity_token_file,
        trust_config,
    )
    opened = SafetyVector.open(vector)
    with progress_bar("Checking") as progress:
        signed = sign_vector(opened, signer, progress=progress)
    if as_json:
        print_json(_to_json(opened, signed))
        return
    say(f"{len(signed.files)} files signed: {opened.location.path / SIGNATURE_FILE}")
    table = Table("plan", "task model", "beta", "scope", box=None)
    for name, resolved in signed.plans.items():
        model = resolved.plan.task_model
        shown = f"{escape(model.id)} {short(model.fingerprint)}"
        table.add_row(escape(name), shown, f"{resolved.beta:g}", resolved.scope)
    if signed.plans:
        out.print(table)


def signed_by(vector: str, requirement: str | None) -> tuple[str, int] | None:
    """Who signed a vector, and how many files, each checked to the last byte.

    Args:
        vector: Folder or Hub id.
        requirement: As the option gives it; None: nothing is asked.

    Raises:
        ConfigError: The requirement is not one, or its key cannot be used.
        SignatureError: It is not met.
    """
    if requirement is None:
        return None
    required = parse_requirement(requirement)
    location = _whole(vector)
    signature = read_signature(location, required)
    links = location.repo_id is not None
    return signature.signed_by, check_folder(signature, location.path, links=links)


def _whole(vector: str) -> Location:
    """With every file that a signature may cover."""
    return locate(vector, allow_patterns=("*",), what="safety vector")


def _to_json(vector: SafetyVector, signed: Signed) -> dict[str, object]:
    return {
        "name": vector.name,
        "fingerprint": vector.fingerprint,
        "signature": SIGNATURE_FILE,
        "files": signed.files,
        "plans": {
            name: {
                "task_model": resolved.plan.task_model.model_dump(mode="json"),
                "digest": resolved.digest,
                "beta": resolved.beta,
                "scope": resolved.scope,
            }
            for name, resolved in signed.plans.items()
        },
    }


def _signer(
    private_key: Path | None,
    password_file: Path | None,
    certificate: Path | None,
    chain: list[Path],
    sigstore: bool,
    identity_token_file: Path | None,
    trust_config: Path | None,
) -> KeySigner | CertificateSigner | SigstoreSigner:
    if sigstore == (private_key is not None):
        raise typer.BadParameter("give one of the two", param_hint="--private-key and --sigstore")
    if sigstore:
        if password_file or certificate or chain:
            raise typer.BadParameter("it takes no key or certificate", param_hint="--sigstore")
        token = identity_token_file and _read_secret(identity_token_file, "--identity-token-file")
        return SigstoreSigner(token or None, trust_config)
    assert private_key is not None
    if identity_token_file or trust_config:
        raise typer.BadParameter("they need --sigstore", param_hint="--trust-config and the like")
    if certificate is None:
        if chain:
            raise typer.BadParameter("it needs --certificate", param_hint="--certificate-chain")
        password = password_file and _read_secret(password_file, "--password-file").encode()
        return KeySigner(private_key, password or None)
    if password_file:
        raise typer.BadParameter(
            "model-signing takes a certificate's key without a password only",
            param_hint="--password-file",
        )
    return CertificateSigner(private_key, certificate, chain)


def _read_secret(path: Path, option: str) -> str:
    """A file's one line."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{option} '{path}'", expected="a file with one line", got=error, fix="Check it."
        ) from error
