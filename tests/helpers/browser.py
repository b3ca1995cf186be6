"""Pages of a site in headless Chromium: one browser loads every page in frames of several widths, and measures it."""

import json
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = """<!doctype html><meta charset="utf-8"><body><script>
const jobs = %s, results = [];
function measure(frame, page, width) {
  const doc = frame.contentDocument, root = doc.documentElement, view = frame.contentWindow;
  const limit = root.clientWidth + 1, wide = [], cut = [];
  function scrolls(e) {
    for (let p = e; p && p !== doc.body; p = p.parentElement)
      if (["auto", "scroll"].includes(view.getComputedStyle(p).overflowX)) return true;
    return false;
  }
  for (const e of doc.querySelectorAll("article *")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > limit && !scrolls(e)) wide.push(e.outerHTML.slice(0, 120));
  }
  // Columns of tables and lines of code that only scrolling shows.
  for (const e of doc.querySelectorAll("article .md-typeset__table, article pre > code"))
  {
    const box = e.closest(".md-typeset__scrollwrap") || e, hidden = box.scrollWidth - box.clientWidth;
    if (hidden > 1) cut.push([e.tagName, hidden, e.innerText.slice(0, 60)]);
  }
  const raw = [], walker = doc.createTreeWalker(doc.querySelector("article") || doc.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.parentElement.closest("pre, code, script, style, math")) raw.push(node.data);
  }
  const codes = [...doc.querySelectorAll("article :not(pre) > code")].map(e => e.innerText);
  const signatures = [...doc.querySelectorAll(".doc-signature")].map(e => e.innerText);
  const images = [...doc.images].filter(e => e.complete && !e.naturalWidth).map(e => e.src);
  const overflow = root.scrollWidth - root.clientWidth;
  results.push({page, width, overflow, wide: wide.slice(0, 3), cut, raw, codes, signatures, images});
}
async function run() {
  for (const [page, width] of jobs) {
    const frame = document.createElement("iframe");
    frame.width = width; frame.height = 900; frame.style.border = 0;
    await new Promise(done => { frame.onload = done; frame.src = page; document.body.append(frame); });
    await frame.contentDocument.fonts.ready;
    await new Promise(done => setTimeout(done, 60));
    measure(frame, page, width);
    frame.remove();
  }
  await fetch("/results", {method: "POST", body: JSON.stringify(results)});
}
run();
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serve a site and the page that measures it, and receive the results."""

    def do_GET(self):
        if self.path != "/driver":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.server.driver.encode())

    def do_POST(self):
        self.server.results = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *args):
        """Print no requests."""


def chromium(*options, **arguments):
    """Start Chromium without a window, with a profile of its own."""
    profile = tempfile.mkdtemp()
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}")
    return subprocess.Popen(
        [CHROMIUM, *flags, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **arguments
    )


def measure(site, widths, timeout=600):
    """Measure each HTML page of a directory at each width.

    Returns:
        One dictionary per page and width: the pixels by which the page is too wide, the elements that are too wide,
        tables and code that are cut off, texts outside of code, code within texts,
        signatures, and images that did not load.
    """
    pages = sorted(str(path.relative_to(site)) for path in Path(site).rglob("*.html") if path.name != "404.html")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    server.driver = DRIVER % json.dumps([[f"/{page}", width] for page in pages for width in widths])
    server.done, server.results = threading.Event(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    process = chromium("--window-size=2000,1200", f"http://127.0.0.1:{server.server_address[1]}/driver")
    try:
        if not server.done.wait(timeout):
            raise TimeoutError(f"Chromium did not measure {len(pages)} pages in {timeout} seconds.")
    finally:
        process.terminate()
        process.wait()
        server.shutdown()
    return server.results


def screenshot(url, path, width, height=1200, timeout=60):
    """Write an image of a page."""
    process = chromium(f"--screenshot={path}", f"--window-size={width},{height}", url)
    try:
        process.wait(timeout)
    finally:
        process.kill()
