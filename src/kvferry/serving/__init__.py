"""An HTTP server over the embedded engine, in the shape of OpenAI's API. Knows no connector."""
