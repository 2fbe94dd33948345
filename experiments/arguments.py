"""What several scripts take from the command line, and the checks behind it."""

import argparse
import math
import os
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageFont, ImageOps, UnidentifiedImageError

from model_llava import DTYPES

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "tiny" / "qwen2-vl"


class OneLineParser(argparse.ArgumentParser):
    """Bad input gets exactly one line and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def whole_number(low):
    """An argparse type: a whole number of at least `low`."""
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
    """An argparse type: a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def device_name(text):
    """An argparse type: auto, cpu, cuda or cuda:N, if there is such a device."""
    try:
        device = torch.device("cpu" if text == "auto" else text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not among the {torch.cuda.device_count()} "
                                         "CUDA devices that PyTorch finds; cpu or auto is right")
    return text


def find_device(name):
    """What a device_name stands for: auto is CUDA if there is one, as in model_llava.load."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def output_file(text):
    """An argparse type: a file that can be written, so that no long run ends in vain."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; a file in a folder that "
                                         "exists is right")
    return path


def png_file(text):
    """An argparse type: an output_file whose name ends in .png."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png")
    return output_file(text)


def output_folder(text):
    """An argparse type: a folder that can be written, made if there is none."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    if not (Path(text).is_dir() and os.access(text, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{str(text)!r} is not a folder that can be made and "
                                         "written")
    return Path(text)


def font_files(folder):
    """An argparse type: the TrueType files in a folder and the folders in it."""
    files = sorted(map(str, Path(folder).rglob("*.ttf")))
    if not files:
        raise argparse.ArgumentTypeError(f"{folder!r} has no .ttf file in it")
    for file in files:
        try:
            ImageFont.truetype(file)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{file!r} is not a font ({error})") from None
    return files


def open_image(path):
    """An image file -> PIL image in RGB, turned as its EXIF data says. Raises ValueError."""
    if not Path(path).exists():
        raise ValueError(f"--image {path}: no such file")
    if not Path(path).is_file():
        raise ValueError(f"--image {path}: not a file; a picture (PNG, JPEG, ...) is right")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"--image {path}: too large; at most {Image.MAX_IMAGE_PIXELS:,} pixels "
                         "are right") from None
    except UnidentifiedImageError:
        raise ValueError(f"--image {path}: not a picture that Pillow can read") from None
    except Exception as error:           # Pillow's decoders raise what they please at damaged files
        raise ValueError(f"--image {path}: damaged ({error})") from None


def add_model_arguments(parser):
    """--model, --device, --dtype and --seed, the same for every script."""
    parser.add_argument("--model", default=str(DEFAULT_MODEL), metavar="DIR_OR_HUB_ID",
                        help="a checkpoint's folder or hub id (default: the small model in tiny/)")
    parser.add_argument("--device", type=device_name, default="auto",
                        help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="auto: float32 on a CPU, the checkpoint's own on CUDA")
    parser.add_argument("--seed", type=whole_number(0), default=0)


def as_typed(model):
    """A model's folder as a reader would type it: relative to the repository if it lies there."""
    path, root = Path(model).resolve(), DEFAULT_MODEL.parents[1]
    inside = path.exists() and path.is_relative_to(root)
    return path.relative_to(root).as_posix() if inside else str(model)
