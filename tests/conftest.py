from __future__ import annotations

import atexit
import lzma
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Read by huggingface_hub at its import: no test touches the user's cache, phones home, or takes a proxy to loopback.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ckptsurgery-hub-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

# A loaded machine is slow, not wrong; and what failed once in CI must fail again at one's desk.
settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quantised weights of the libraries, whose files are kept compressed."""
    folder = tmp_path_factory.mktemp("quantised")
    for path in (Path(__file__).parent / "data" / "quantised").glob("*.xz"):
        (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    return folder


@pytest.fixture
def own_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the ops that a test registers; those that come with the package are all there before."""
    from ckptsurgery.ops import registry  # not before the environment is set

    registry.op_names()
    monkeypatch.setattr(registry, "_OPS", dict(registry._OPS))


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's executable."""
    found = browser()
    assert found is not None, "a Chromium is insisted on, and is not here"
    return found


BROWSER_TESTS = "tests/pages/test_in_a_browser.py"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what needs a browser where there is none, unless it is insisted on."""
    if collection_path.name != Path(BROWSER_TESTS).name or "CKPTSURGERY_INSIST_ON_BROWSER" in os.environ:
        return None
    return None if browser() else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left out, and how to get it."""
    if not browser():
        how = "apt-get install chromium, or CKPTSURGERY_CHROMIUM=/path/to/chromium"
        terminalreporter.write_line(f"left out, since no Chromium is here: {BROWSER_TESTS} ({how})")


def browser() -> str | None:
    """The Chromium that shows pages: that of the environment variable, else the first of the usual names."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CKPTSURGERY_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
