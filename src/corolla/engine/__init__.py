"""One server's compute: scheduler, KV pages, executor, sampler."""
