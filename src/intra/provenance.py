"""Which code this is."""

import hashlib
from functools import cache
from pathlib import Path

__all__ = ["code_sha256"]


@cache
def code_sha256() -> str:
    """The SHA-256 over the package's modules, by name and content: more exact than a version, and without git."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
