"""llama-cpp-python behind a pipe: one JSON request a line on standard input, one JSON answer a line on standard output.

    PYTHON benchmarks/llama_peer.py MODEL.gguf THREADS CONTEXT

A request is {"prompt": [token ids], "new_tokens": n}; the answer is {"token_ids": [...], "times": [...]}, seconds from
the request to each token, chosen greedily. Runs under any interpreter that has llama_cpp and needs nothing of Corolla.
"""

import json
import sys
import time

import llama_cpp


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llama = llama_cpp.Llama(path, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        llama.reset()
        token_ids, times = [], []
        began = time.perf_counter()
        for token_id in llama.generate(request["prompt"], temp=0.0, repeat_penalty=1.0):
            times.append(time.perf_counter() - began)
            token_ids.append(token_id)
            if len(token_ids) == request["new_tokens"]:
                break
        print(json.dumps({"token_ids": token_ids, "times": times}), flush=True)


if __name__ == "__main__":
    main()
