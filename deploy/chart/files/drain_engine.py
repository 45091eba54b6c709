import re
import time
import urllib.request

time.sleep(10)  # for the router to hear that this pod goes
idle = 0
while idle < 3:
    try:
        text = urllib.request.urlopen("http://127.0.0.1:8000/metrics", timeout=5).read().decode()
    except OSError:
        break  # nothing is left to wait for
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
    idle = 0 if any(map(float, found)) else idle + 1
    time.sleep(2)
