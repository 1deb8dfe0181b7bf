"""The Python SDK and the `duquant` command line. It talks to the service over HTTP and starts it as processes."""
