"""Sign a package or an adapter, and verify whose it is: OpenSSF Model Signing's format, with a key alone, offline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.exchange.manifest import SIGNATURE


def load_signer(key: Path) -> Callable[[Path], None]:
    """Return what signs a folder with a private key (PEM, of an elliptic curve); UserError where that can't be read."""
    with _describing(f"{key}: no private key to sign with"):
        from model_signing import hashing, signing

        signer = signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False))
    return lambda folder: signer.sign(folder, folder / SIGNATURE)


def verify_signature(folder: Path, key: Path) -> None:
    """Raise UserError unless the owner of a public key has signed every file of a folder as it is.

    The folder is one whose files were checked (`read_checked`).
    """
    with _describing(f"{key}: no public key to verify with"):
        from model_signing import verifying

        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    if not (folder / SIGNATURE).is_file():
        raise UserError(f"{folder}: it is not signed ({SIGNATURE} is missing); ask for a signed one")
    with _describing(f"{folder}/{SIGNATURE}: it is not what the owner of {key} signed"), redirect_stdout(StringIO()):
        verifier.verify(folder, folder / SIGNATURE)


@contextmanager
def _describing(what: str) -> Iterator[None]:
    """Turn any error into a UserError: a damaged signature, or a key of another kind, may lead to all kinds."""
    try:
        yield
    except ImportError:
        raise UserError("signatures need the extra `signing`: pip install 'scaleot[signing]'") from None
    except Exception as error:
        raise UserError(f"{what} ({one_line(error)})") from error
