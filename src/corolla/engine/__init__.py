"""One server's compute: scheduler, KV pages, runner, sampler."""
