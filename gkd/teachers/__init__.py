"""Teachers by name: to add one, write a class with `score` and put it into the dict."""

from __future__ import annotations

from gkd.teachers.base import Teacher
from gkd.teachers.local import LocalTeacher
from gkd.teachers.server import ServerTeacher

TEACHERS: dict[str, type] = {"local": LocalTeacher, "server": ServerTeacher}

__all__ = ["TEACHERS", "LocalTeacher", "ServerTeacher", "Teacher"]
