"""A page as a real browser sees it: no network, what a script finds there given back."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PROBE = """<script>addEventListener("load", () => {
  const found = (() => { %s })();
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = JSON.stringify(found);
  document.body.append(probe);
});</script>"""


def chromium() -> str:
    """The browser's path; skips the test where there is none."""
    found = next((path for path in map(shutil.which, _NAMES) if path), None)
    return found or pytest.skip(f"needs a browser: {', '.join(_NAMES)}")


def dumped(page_html: str, tmp_path: Path, script: str, width_px: int = 1280) -> dict:
    """What `script`, the body of a function, returns in the loaded page."""
    page = tmp_path / "page.html"
    page.write_text(page_html + _PROBE % script, encoding="utf-8")
    command = [
        chromium(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--proxy-server=127.0.0.1:9",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width_px},2000",
        "--dump-dom",
        page.as_uri(),
    ]
    ran = subprocess.run(command, check=True, capture_output=True, timeout=60)
    dom = ran.stdout.decode("utf-8")
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert probe, f"the page's script did not run: {dom[-400:]}"
    return json.loads(html.unescape(probe[1]))
