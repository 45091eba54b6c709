import json
import os
import urllib.request

url, timeout_s = os.environ["URL"], float(os.environ["TIMEOUT_S"])


def get(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    key = os.environ.get("MRSA_KEY")
    if key:
        request.add_header("Authorization", "Bearer " + key)
    return json.load(urllib.request.urlopen(request, timeout=timeout_s))


print(get("/health/ready"))
model = os.environ.get("MODEL") or get("/v1/models")["data"][0]["id"]
question = [{"role": "user", "content": "Say hello."}]
body = {"model": model, "messages": question, "max_completion_tokens": 16, "reasoning_effort": "none"}
answer = get("/v1/chat/completions", body)
print(answer["choices"][0], answer["usage"])
assert answer["usage"]["completion_tokens"] > 0
