"""The report as a browser draws it. Also makes the picture of a README:

python tests/test_report_browser.py OUT/report.html docs/report.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """The first Chromium on the PATH."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def screenshot(
    html: Path, png: Path, *, width: int = 1280, height: int = 1400, dark: bool = False, scale: float = 1.0
) -> None:
    """Draw a local page to ``png`` with headless Chromium; ``width`` and ``height`` are CSS pixels.

    Windows are never narrower than 500 pixels, so a phone is drawn by a frame in a page.

    Raises:
        RuntimeError: if there is no Chromium, or it wrote no picture.
    """
    browser = find_browser()
    if browser is None:
        raise RuntimeError(f"No Chromium was found; install one of {', '.join(BROWSERS)}.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = html.resolve()
        if width < 500:
            frame = Path(folder) / "frame.html"
            frame.write_text(
                f"<!doctype html><meta name='color-scheme' content='light dark'><body style='margin:0'>"
                f"<iframe src='{page.as_uri()}' style='border:0;width:{width}px;height:{height}px'></iframe>",
                encoding="utf-8",
            )
            page = frame
        png.unlink(missing_ok=True)
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile", f"--window-size={max(width, 500)},{height}",
            f"--force-device-scale-factor={scale:g}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--screenshot={png.resolve()}", page.as_uri(),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not png.is_file():
        raise RuntimeError(f"Chromium wrote no picture (exit status {result.returncode}): {result.stderr[-2000:]}")


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_report_is_drawn(width: int, dark: bool, tmp_path: Path) -> None:
    import numpy as np
    from matplotlib.image import imread
    from test_report import full_manifest

    from effc.compiler.report import write_report

    html, png = tmp_path / "report.html", tmp_path / "report.png"
    write_report(full_manifest(), html)
    screenshot(html, png, width=width, height=1600, dark=dark)
    image = imread(png)[:, :width, :3]
    assert image.shape == (1600, width, 3)
    background = image[-1, 2]
    assert background.mean() < 0.2 if dark else background.mean() > 0.9
    # Text, figures and cards all over the page: no band of 200 rows may be of one colour.
    for top in range(0, 1600, 200):
        assert np.ptp(image[top : top + 200].mean(axis=2)) > 0.3, f"rows {top} to {top + 200} are blank"
    # Nothing sticks out on the right, where the page has its margin.
    assert np.abs(image[60:, -4:] - background).max() < 0.05


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    screenshot(source, target, width=1180, height=1120, scale=1.5)
