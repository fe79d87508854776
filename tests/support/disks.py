"""A disk that is soon full."""

import subprocess


def small_disk(path, size):
    """A file system of that size, where this process may mount one."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], capture_output=True)
    return mounted.returncode == 0
