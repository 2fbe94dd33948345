"""What several scripts of experiments/ take from the command line: types for argparse, which turns
their ArgumentTypeError into one line that names the option."""

import argparse
import math
import os
from pathlib import Path

from PIL import ImageFont

from model_llava import find_device
from sparsemm import DEFAULT_MODEL, check_output


def whole_number(low):
    """A whole number of at least `low`."""
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return value
    return convert


def share(text):
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def device_name(text):
    """auto, cpu, cuda or cuda:N -> torch.device."""
    try:
        return find_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def png_file(text):
    """A file that can be written, so that no long run ends in vain, and ends in .png."""
    try:
        check_output(text, "file", ".png")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def output_folder(text):
    """A folder that can be written, made if there is none."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    if not (Path(text).is_dir() and os.access(text, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{str(text)!r} is not a folder that can be made and "
                                         "written")
    return Path(text)


def font_files(folder):
    """A folder -> the TrueType files in it and in its folders."""
    files = sorted(map(str, Path(folder).rglob("*.ttf")))
    if not files:
        raise argparse.ArgumentTypeError(f"{folder!r} has no .ttf file in it")
    for file in files:
        try:
            ImageFont.truetype(file)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{file!r} is not a font ({error})") from None
    return files


def as_typed(model):
    """A model's folder as a reader would type it: relative to the repository if it lies there."""
    path, root = Path(model).resolve(), DEFAULT_MODEL.parents[1]
    inside = path.exists() and path.is_relative_to(root)
    return path.relative_to(root).as_posix() if inside else str(model)
