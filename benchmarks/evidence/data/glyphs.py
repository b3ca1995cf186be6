"""Characters rendered from the text fonts of Debian's fonts-* packages, one font per package."""

from __future__ import annotations

import re
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.evidence.data.examples import Examples

FILE_LISTS = Path("/var/lib/dpkg/info")  # dpkg's lists of the files that each package installs
_NAMES = """
3270 adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris adf-mekanus adf-oldania
adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis adf-verana agave allerta anonymous-pro apropal arapey
arkpandora b612 bajaderka bebas-neue beteckna breip cabin cantarell cardo century-catalogue clear-sans comfortaa
comic-neue courier-prime crosextra-caladea crosextra-carlito dancingscript dejavu-core dkg-handwriting dosis ebgaramond
ecolier-court essays1743 eurofurence fanwood fantasque-sans femkeklaver firacode go gnutypewriter goudybookletter hack
hermit humor-sans inconsolata inter isabella jetbrains-mono junction junicode jura karla kaushanscript klaudia-berenika
kristi lato league-mono league-spartan leckerli-one levien-museum levien-typoscript liberation lindenhill linuxlibertine
lobster lobstertwo manrope millimetre mononoki national-park ocr-a ocr-b okolaks oldstandard open-sans opendin
opendyslexic osifont oxygen paratype play prociono quattrocento quicksand radisnoir roboto-slab roboto-unhinted
routed-gothic rufscript sil-andika sil-charis sil-doulos sil-gentium sjfonts sora summersby tomsontalks tuffy
ubuntu-title vollkorn yanone-kaffeesatz
"""
PACKAGES = tuple(_NAMES.split())  # without the prefix fonts-
CAPITALS = string.ascii_uppercase
CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
REGULAR = re.compile(r"regular|_R$", re.IGNORECASE)
SYMBOLS = "!#$%&()*+/?@"
FONT_SIZE, SIDE, INNER = 64, 28, 20  # pixels: of the rendering, of an image, and of the character in it


def font_files() -> list[Path]:
    """Return one font file per package, in the order of `PACKAGES`: the regular style, else the shortest file name.

    Raises:
        FileNotFoundError: A package is not installed.
    """
    lists = {name: FILE_LISTS / f"fonts-{name}.list" for name in PACKAGES}
    missing = [f"fonts-{name}" for name, path in lists.items() if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"This task needs Debian packages with fonts, of which {len(missing)} are not installed: apt-get install "
            f"{' '.join(missing)}."
        )
    found = []
    for path in lists.values():
        files = [Path(line) for line in path.read_text().splitlines() if line.lower().endswith((".ttf", ".otf"))]
        found.append(min(files, key=lambda file: (not REGULAR.search(file.stem), len(file.name), file.name)))
    return found


def render(font: ImageFont.FreeTypeFont, character: str) -> Tensor:
    """Render a character as white on black pixels (28, 28) in [0, 1], scaled to 20 pixels and centered."""
    canvas = Image.new("L", (4 * FONT_SIZE, 4 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE, FONT_SIZE), character, fill=255, font=font)
    box = canvas.getbbox()
    if box is None:  # no pixels
        return torch.zeros(SIDE, SIDE)
    glyph = canvas.crop(box)
    scale = INNER / max(glyph.size)
    width, height = (max(1, round(scale * size)) for size in glyph.size)
    image = Image.new("L", (SIDE, SIDE))
    image.paste(glyph.resize((width, height), Image.Resampling.LANCZOS), ((SIDE - width) // 2, (SIDE - height) // 2))
    return torch.tensor(np.asarray(image)).float() / 255


def render_fonts() -> Tensor:
    """Return the images (fonts, characters and symbols, 28, 28) of all fonts that have all characters.

    The image of a symbol that a font lacks is black. A font draws the same box for all characters that it lacks: it
    lacks a character if the image equals that of a code point that no font has.
    """
    fonts = []
    for path in font_files():
        font = ImageFont.truetype(str(path), FONT_SIZE)
        missing = render(font, "\U0010ffff")
        images = [render(font, character) for character in CHARACTERS + SYMBOLS]
        has = [bool(image.any()) and not torch.equal(image, missing) for image in images]
        if all(has[: len(CHARACTERS)]):
            fonts.append(torch.stack([image * known for image, known in zip(images, has, strict=True)]))
    return torch.stack(fonts)


def split_fonts(fonts: Tensor, *sizes: int, seed: int = 0) -> list[Tensor]:
    """Draw disjoint random subsets of the fonts; with the same seed, a larger last subset contains a smaller one.

    Raises:
        ValueError: There are fewer fonts than the sizes add up to.
    """
    if sum(sizes) > len(fonts):
        raise ValueError(f"sizes must add up to at most {len(fonts)}, the number of fonts, got {sizes}.")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(fonts)))
    return [fonts[part] for part in order[: sum(sizes)].split(list(sizes))]


def to_examples(fonts: Tensor, characters: str) -> Examples:
    """Return the images of characters in all fonts that have them, with values in [-1, 1]."""
    columns = [(CHARACTERS + SYMBOLS).index(character) for character in characters]
    images, labels = fonts[:, columns].flatten(0, 1), torch.arange(len(columns)).repeat(len(fonts))
    known = images.flatten(1).any(dim=1)
    return Examples(labels[known], pixel_values=2 * images[known][:, None] - 1)
