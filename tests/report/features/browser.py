"""Headless Chromium for pages: what a person would see after clicking."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
"""Path of the browser, or None."""


def browse(profile: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run it offline with a profile of its own."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--enable-logging=stderr", "--virtual-time-budget=8000", f"--user-data-dir={profile}",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--no-sandbox")
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=90, check=True
    )


DRIVER = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const texts = (query) => [...document.querySelectorAll(query)].map((e) => e.textContent);
const type = (text) => {
  const box = document.getElementById("find");
  box.value = text;
  box.dispatchEvent(new Event("input"));
  return wait(300);
};
const click = (query) => { document.querySelector(query).click(); return wait(100); };
const drive = async () => { %s };
addEventListener("load", async () => {
  await wait(200);
  const said = document.createElement("pre");
  said.id = "said";
  try { said.textContent = JSON.stringify(await drive()); }
  catch (error) { said.textContent = JSON.stringify({ error: String(error) }); }
  document.body.append(said);
});
"""


def with_driver(page: str, steps: str) -> str:
    """A page that also takes steps on itself; what they return is read by :func:`said`."""
    return page.replace("</body>", f"<script>{DRIVER % steps}</script></body>")


def said(done: subprocess.CompletedProcess[str]) -> Any:
    """What the steps returned; errors of the page's own scripts fail."""
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, "the steps did not end"
    return json.loads(html.unescape(found[1]))
