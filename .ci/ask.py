"""Wait for the page of `make up`, then ask its model through OpenAI's client."""

import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

from openai import OpenAI

url = sys.argv[1]
deadline = time.monotonic() + 300
while True:
    try:
        with urlopen(f"{url}/readyz", timeout=5) as answer:
            if answer.status == 200:
                break
    except (URLError, TimeoutError, ConnectionError):
        pass
    if time.monotonic() > deadline:
        sys.exit(f"{url} is not ready")
    time.sleep(1)
with urlopen(url, timeout=5) as page:
    assert b"Corolla" in page.read(), "this is not the page"
question = {"role": "user", "content": "What is the capital of France?"}
reply = OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(model="smollm2", messages=[question], temperature=0)
text = reply.choices[0].message.content or ""
print(text)
assert "Paris" in text, text
