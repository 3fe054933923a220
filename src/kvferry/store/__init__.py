"""Content-addressed chunks in shared memory, with tiers below. Knows no engine, request, tensor or socket."""
