"""From an artifact to a Triton server that runs it, and to what that server does under load.

The topmost layer below the command line: it reads artifacts, and nothing of effc imports it. ``backend/`` is what runs
inside the server.
"""
