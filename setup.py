"""What pyproject.toml cannot say: when to refuse a build, and what PyPI shows of the README."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
KERNELS = ROOT / "detloss_triton" / "kernels"

if not (KERNELS / "__init__.py").is_file():
    raise SystemExit(
        "detloss_triton/kernels is a symlink to ../kernels, and here it is not: a checkout or "
        "archive unpacked without symlinks, from which a wheel would have no kernels. Remedy: "
        "git config core.symlinks true, then git checkout -- detloss_triton/kernels"
    )


def readme() -> str:
    """README.md without its pictures, and with plain text for links into the repository.

    Outside a checkout these lead nowhere, and the repository has no public address yet.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*?\]\((?!https?://).*?\)\n\n", "", text, flags=re.MULTILINE)
    return re.sub(r"(?<![\w\]])\[([^\[\]]+)\]\((?!https?://)[^()]+\)", r"\1", text)


setup(long_description=readme(), long_description_content_type="text/markdown")
