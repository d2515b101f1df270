"""Leads every connection of mitmproxy to the bench's upstream."""

import os


def server_connect(data):
    data.server.address = ("127.0.0.1", int(os.environ["BENCH_UPSTREAM_PORT"]))
