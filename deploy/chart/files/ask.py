import json
import os
import time
import urllib.error
import urllib.request

url, timeout_s = os.environ["URL"], float(os.environ["TIMEOUT_S"])
until = time.monotonic() + timeout_s


def get(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    key = os.environ.get("MRSA_KEY")
    if key:
        request.add_header("Authorization", "Bearer " + key)
    try:
        return json.load(urllib.request.urlopen(request, timeout=timeout_s))
    except urllib.error.HTTPError as error:
        if path != "/health/ready":
            print(path, error.code, error.read().decode())
        raise


while True:  # weights may be on their way, and the engine may load
    try:
        print(get("/health/ready"))
        break
    except OSError as error:
        if time.monotonic() > until:
            raise
        print("not ready:", error, flush=True)
        time.sleep(min(5, timeout_s / 20))
model = os.environ.get("MODEL") or get("/v1/models")["data"][0]["id"]
question = [{"role": "user", "content": "Say hello."}]
body = {"model": model, "messages": question, "max_completion_tokens": 16, "reasoning_effort": "none"}
answer = get("/v1/chat/completions", body)
print(answer["choices"][0], answer["usage"])
assert answer["usage"]["completion_tokens"] > 0
