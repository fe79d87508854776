"""Teachers by name: to add one, write a class with `score` and put it into the dict."""

from __future__ import annotations

from gkd.teachers.base import Teacher
from gkd.teachers.cached import CachedTeacher
from gkd.teachers.local import LocalTeacher
from gkd.teachers.server import ServerTeacher
from gkd.teachers.shared import RoutedTeacher, SharedTeacher

TEACHERS: dict[str, type] = {"local": LocalTeacher, "cached": CachedTeacher, "server": ServerTeacher}
TEACHERS |= {"shared": SharedTeacher, "routed": RoutedTeacher}

__all__ = ["TEACHERS", "CachedTeacher", "LocalTeacher", "RoutedTeacher", "ServerTeacher", "SharedTeacher", "Teacher"]
