"""What worker processes run: it must be importable by name, which test modules are not."""

from __future__ import annotations


def first_pixel(task):
    images, key = task
    return images[key].getpixel((0, 0))
