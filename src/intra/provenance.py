"""Which code this is, and what it runs on."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

__all__ = ["code_sha256", "commit_of_the_code", "measured_on", "processor"]

CPUINFO = Path("/proc/cpuinfo")


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


def commit_of_the_code() -> str | None:
    """The checkout's commit, with "+changes" if this package's tracked files differ; None outside a checkout."""
    package = Path(__file__).parent

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=False)

    try:
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:  # a repository that merely contains it
            return None
        head = git("rev-parse", "HEAD")
        return None if head.returncode else head.stdout.strip() + "+changes" * bool(
            git("diff", "--quiet", "HEAD", "--", ".").returncode)
    except OSError:  # no git
        return None


def measured_on() -> dict[str, str | None]:
    """What stands beside a figure: hardware, python and commit."""
    return {"hardware": f"{processor()}, {os.cpu_count()} threads", "python": platform.python_version(),
            "commit": commit_of_the_code()}


def processor() -> str:
    """The processor's name where the system tells it, with family and model, as some share a name over generations."""
    if CPUINFO.is_file():
        first = CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        if "model name" in told:
            numbers = [f"{label} {told[key]}" for label, key in (("family", "cpu family"), ("model", "model"))
                       if key in told]
            return f"{told['model name']} ({', '.join(numbers)})" if numbers else told["model name"]
    return platform.processor() or platform.machine()
