"""A page with a slider: the same weights and the same noise at any drop fraction.

python examples/budget_slider.py CHECKPOINT        then open http://localhost:8000
"""

import io
import json
import sys
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import dcdit
from dcdit.sample.image_generator import ImageGenerator

PAGE = b"""<!DOCTYPE html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>budget</title><style>body { font: 16px sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }
img { width: 49%; image-rendering: pixelated } input { width: 100% }</style>
<label>drop fraction <output id="rho"></output><input id="drop" type="range" min="0" max="0.9" step="0.1" value="0">
</label><p id="text"></p><img id="image" alt="image"><img id="tokens" alt="kept tokens">
<script>
const at = id => document.getElementById(id);
let busy = false, wanted = null;
async function draw() {
  at("rho").textContent = wanted = at("drop").value;
  if (busy) return;                       // the newest value is drawn when the present one is done
  busy = true;
  for (let drawn = null; drawn !== wanted; ) {
    drawn = wanted;
    const found = await (await fetch("draw?drop=" + drawn)).json();
    at("image").src = found.image; at("tokens").src = found.tokens; at("text").textContent = found.text;
  }
  busy = false;
}
at("drop").oninput = draw; draw();</script>"""


def draw(model: ImageGenerator, drop: float, steps: int) -> dict[str, str]:
    """The image, the tokens kept at the last step, and what was kept over all steps."""
    (image,), (maps,) = model.generate(0, drop_fraction=drop, num_steps=steps, return_maps=True, progress=False)
    kept = sum(seen.mask.float().mean().item() for seen in maps) / len(maps)
    return {"image": url(image), "tokens": url(maps[-1].over(image)), "text": f"{kept:.1%} of the tokens kept"}


def url(image) -> str:
    file = io.BytesIO()
    image.save(file, format="png")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def serve(model: ImageGenerator, port: int, steps: int = 20) -> ThreadingHTTPServer:
    """A server on this machine only; ``serve_forever`` runs it."""
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if address.path != "/draw":
                return self.answer("text/html", PAGE)
            try:
                with one_at_a_time:
                    found = draw(model, float(parse_qs(address.query)["drop"][0]), steps)
            except (KeyError, ValueError) as error:
                return self.send_error(400, str(error))
            return self.answer("application/json", json.dumps(found).encode())

        def answer(self, kind: str, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content)

    return ThreadingHTTPServer(("localhost", port), Handler)


if __name__ == "__main__":
    checkpoint = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
    serve(dcdit.load(checkpoint), 8000).serve_forever()
