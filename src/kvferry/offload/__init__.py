"""kvferry's own connector, built on the public API: what to keep and load, and who copies it. Knows no engine."""
