"""One panel of the page for each condition of a model, and one for the original of a completion.

Here and in `page.py` gradio is used; it is imported when a page is built. The components of a panel are
inputs of the generation, and `read` turns what they hold into a value of `taming.web.conditions`.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from taming.colormap import label_colors
from taming.data.files.label_files import read_labels
from taming.web.conditions import (
    BOXES,
    CLASS,
    COORDINATES,
    IMAGE,
    LABELS,
    NOTHING,
    TOKENS,
    Condition,
    boxes_of_rows,
    layout_image,
    rows_of_boxes,
)
from taming.web.painting import (
    Size,
    canvas_size,
    fitted,
    hex_color,
    paint_labels,
)
from taming.web.session import Loaded, Session
from taming.web.uploads import read_upload

HEADERS = ["what", "left %", "top %", "right %", "bottom %"]
DATATYPES: Any = ["str", *["number"] * 4]
RED = "#ff0040"  # the brush that marks what is generated again


@dataclass
class Panel:
    """Inputs on the page, and a function that reads them."""

    components: list[Any]
    read: Callable[..., Any]


def shown(function: Callable) -> Callable:
    """Wrap an event so that a user's mistake is shown on the page and changes nothing else."""
    import gradio as gr

    @wraps(function)
    def guarded(*values: Any) -> Any:
        try:
            return function(*values)
        except (ValueError, FileNotFoundError) as error:
            # not raised: that would cover the inputs with the word "Error"
            gr.Warning(html.escape(str(error)), title="This does not work", duration=20)
            return gr.skip()

    return guarded


def condition_panel(session: Session, loaded: Loaded, condition: Condition, size: list[Any]) -> Panel:
    """Return the inputs of one condition; `size` are the components of height and width."""
    import gradio as gr

    make = {
        CLASS: _class_panel, LABELS: _label_panel, IMAGE: _image_panel, BOXES: _box_panel,
        TOKENS: _token_panel,
    }
    if condition.kind in (COORDINATES, NOTHING):
        text = "The coordinates of the whole image are the condition." if condition.kind == COORDINATES else (
            "This model generates without a condition.")
        gr.HTML(text, padding=True)
        return Panel([], lambda: None)
    with gr.Column(elem_id=f"condition-{condition.key}"):
        optional = loaded.model.null_token is not None and len(loaded.conditions) > 1
        leave_out = gr.Checkbox(label=f"leave out the {condition.title}", visible=optional)
        panel = make[condition.kind](session, loaded, condition, size)
    return Panel(
        [leave_out, *panel.components], lambda left_out, *rest: None if left_out else panel.read(*rest)
    )


def _class_panel(session: Session, loaded: Loaded, condition: Condition, size: list[Any]) -> Panel:
    import gradio as gr

    choices = [(name if name == str(i) else f"{i}: {name}", i) for i, name in enumerate(condition.names)]
    chosen = gr.Dropdown(choices, value=0, label=condition.title, elem_id="class")
    return Panel([chosen], lambda number: number)


def _label_panel(session: Session, loaded: Loaded, condition: Condition, size: list[Any]) -> Panel:
    import gradio as gr

    count = len(condition.names)
    colors: list[Any] = [hex_color(color) for color in label_colors(count)]
    resolution = loaded.resolution

    def canvas(fill: int, *sides: int) -> Any:
        ids = np.full(canvas_size(condition.size(_checked(sides), resolution)), fill)
        return _painting(paint_labels(ids, count))

    def upload(path: str, *sides: int) -> dict:
        read_upload(path)  # raises unless it is an image that is small enough
        image = paint_labels(read_labels(path, condition.stage, exact=False).numpy(), count)
        return _painting(_enlarged(image, condition.size(_checked(sides), resolution)))

    def choose(number: int, *sides: int) -> dict:
        image = session.item(loaded.run.name, int(number), condition.key)
        return _painting(_enlarged(image, condition.size(_checked(sides), resolution)))

    editor = gr.ImageEditor(
        canvas(0, *resolution), type="pil", format="png", sources=(), transforms=(),
        layers=False, interactive=True,
        brush=gr.Brush(default_size=40, colors=colors, default_color=colors[-1], color_mode="fixed"),
        label=condition.title, buttons=[], height=480, elem_id="painting",
    )
    gr.HTML(_legend(colors, condition.names), padding=True)
    with gr.Row():
        fill = gr.Dropdown(
            [(name, i) for i, name in enumerate(condition.names)], value=0, label="fill all with",
            elem_id="fill", min_width=140,
        )
        _sources(loaded, upload, choose, size, editor)
    fill.input(shown(canvas), [fill, *size], editor)
    _refit(editor, size, "composite", lambda sides: condition.size(sides, resolution))
    return Panel([editor], lambda value: value and value["composite"])


def _image_panel(session: Session, loaded: Loaded, condition: Condition, size: list[Any]) -> Panel:
    import gradio as gr

    def upload(path: str, *sides: int) -> Image.Image:
        return fitted(read_upload(path), condition.size(_checked(sides), loaded.resolution))

    def choose(number: int, *_: int) -> Image.Image:
        return session.item(loaded.run.name, int(number), condition.key)

    image = gr.Image(
        type="pil", format="png", interactive=False, label=condition.title, buttons=[], height=300,
        elem_id="image",
    )
    with gr.Row():
        _sources(loaded, upload, choose, size, image)
    return Panel([image], lambda value: value)


def _token_panel(session: Session, loaded: Loaded, condition: Condition, size: list[Any]) -> Panel:
    import gradio as gr

    last = len(loaded.dataset) - 1 if loaded.dataset is not None else 0
    number = gr.Number(
        value=0 if loaded.dataset is not None else None, minimum=0, maximum=last, precision=0, elem_id="item",
        label=f"{condition.title} of item, 0 to {last}" if loaded.dataset is not None else loaded.no_data,
        interactive=loaded.dataset is not None,
    )
    return Panel([number], lambda value: value)


def _box_panel(session: Session, loaded: Loaded, condition: Condition, size: list[Any]) -> Panel:
    import gradio as gr

    def layout(rows: list, corner: tuple | None, *sides: int) -> Image.Image:
        image = layout_image(condition, boxes_of_rows(condition, rows), canvas_size(_checked(sides)))
        if corner is not None:
            x, y, draw = corner[0] * image.width, corner[1] * image.height, ImageDraw.Draw(image)
            draw.line((x - 12, y, x + 12, y), fill=RED, width=3)
            draw.line((x, y - 12, x, y + 12), fill=RED, width=3)
        return image

    def click(name: str, rows: list, corner: tuple | None, *sides: int, x: int, y: int) -> tuple:
        height, width = canvas_size(_checked(sides))
        here = x / width, y / height
        if corner is None:
            return rows, here, layout(rows, here, *sides)
        (left, right), (top, bottom) = (sorted(pair) for pair in zip(corner, here, strict=True))
        rows = _filled(rows) + [[name, *(round(100 * share, 1) for share in (left, top, right, bottom))]]
        return rows, None, layout(rows, None, *sides)

    def remove(rows: list, *sides: int) -> tuple:
        rows = _filled(rows)[:-1]
        return rows, None, layout(rows, None, *sides)

    def choose(number: int, *sides: int) -> tuple:
        boxes = session.item(loaded.run.name, int(number), condition.key)
        rows = rows_of_boxes(condition, boxes)
        return rows, None, layout(rows, None, *sides)

    corner = gr.State(None)
    what = gr.Dropdown(
        list(condition.names), value=condition.names[0], elem_id="category", interactive=True,
        label="what to add: choose, then click two opposite corners of its box",
    )
    image = gr.Image(
        layout_image(condition, [], canvas_size((1, 1))), type="pil", format="png", interactive=False,
        label=condition.title, height=400, buttons=[], elem_id="layout",
    )
    table = gr.Dataframe(
        [], headers=HEADERS, datatype=DATATYPES, type="array", column_count=5, buttons=[],
        interactive=True, show_label=False, elem_id="boxes",
    )
    with gr.Row():
        last, none = (gr.Button(f"remove {which}", size="sm") for which in ("the last", "all"))
    if loaded.dataset is not None:
        with gr.Row():
            number, button = _item_inputs(loaded)
        button.click(shown(choose), [number, *size], [table, corner, image])

    def clicked(name: str, rows: list, where: tuple | None, h: int, w: int, event: gr.SelectData) -> tuple:
        x, y = event.index
        return shown(lambda: click(name, rows, where, h, w, x=x, y=y))()

    outputs = [table, corner, image]
    image.select(clicked, [what, table, corner, *size], outputs, show_progress="hidden")
    last.click(shown(remove), [table, *size], outputs, show_progress="hidden")
    none.click(shown(lambda *sides: remove([], *sides)), size, outputs, show_progress="hidden")
    for event in (table.input, *(side.blur for side in size)):
        event(shown(lambda rows, *sides: layout(rows, None, *sides)), [table, *size], image)
    return Panel([table], lambda rows: boxes_of_rows(condition, rows))


def original_panel(session: Session, name: Any, size: list[Any]) -> tuple[Panel, Any]:
    """Return the panel of the image to complete, and the row that takes an item of the data set.

    `name` is the component that holds the name of the run.
    """
    import gradio as gr

    def upload(path: str, *sides: int) -> dict:
        return _painting(fitted(read_upload(path), canvas_size(_checked(sides))))

    def choose(run: str, number: int, *sides: int) -> dict:
        return _painting(fitted(session.item(run, int(number)), canvas_size(_checked(sides))))

    gr.Markdown("Choose an image, then paint over what is to be generated. The rest of it stays.")
    editor = gr.ImageEditor(
        type="pil", format="png", sources=(), transforms=(), layers=False, interactive=True, label="original",
        brush=gr.Brush(default_size=60, colors=[RED], color_mode="fixed"), height=480, buttons=[],
        elem_id="original",
    )
    with gr.Row():
        button = gr.UploadButton("upload", file_types=["image"], size="sm", elem_id="upload-original")
        remove = gr.Button("remove the original", size="sm", elem_id="remove-original")
    with gr.Row() as items:
        number = gr.Number(0, label="item of the data set", precision=0, minimum=0, min_width=140)
        chosen = gr.Button("take the item", size="sm", elem_id="take-original")
    button.upload(shown(upload), [button, *size], editor)
    chosen.click(shown(choose), [name, number, *size], editor)
    remove.click(lambda: None, None, editor)
    _refit(editor, size, "background", lambda sides: sides)

    def read(value: dict | None) -> tuple[Image.Image | None, list]:
        if value is None or value["background"] is None:
            return None, []
        return value["background"], value["layers"]

    return Panel([editor], read), items


# ---- what the panels share


def _sources(loaded: Loaded, upload: Callable, choose: Callable, size: list[Any], target: Any) -> None:
    """Add a button to upload, and one to take an item of the data set."""
    import gradio as gr

    button = gr.UploadButton("upload", file_types=["image"], size="sm", min_width=110, elem_id="upload")
    button.upload(shown(upload), [button, *size], target)
    if loaded.dataset is not None:
        number, take = _item_inputs(loaded)
        take.click(shown(choose), [number, *size], target)


def _item_inputs(loaded: Loaded) -> tuple[Any, Any]:
    import gradio as gr

    last = len(loaded.dataset) - 1
    number = gr.Number(
        0, label=f"item, 0 to {last}", precision=0, minimum=0, maximum=last, min_width=140
    )
    return number, gr.Button("take the item", size="sm", min_width=110, elem_id="take")


def _refit(editor: Any, size: list[Any], part: str, condition_size: Callable[[Size], Size]) -> None:
    """Give a painting the new proportions if the size is changed; `part` is the entry of it that stays."""
    import gradio as gr

    def refit(value: dict | None, *sides: int) -> Any:
        if value is None or value[part] is None:
            return gr.skip()
        height, width = canvas_size(condition_size(_checked(sides)))
        if value[part].size == (width, height):
            return gr.skip()
        return _painting(value[part].resize((width, height), Image.Resampling.NEAREST))

    for side in size:
        side.blur(shown(refit), [editor, *size], editor, show_progress="hidden")


def _painting(image: Image.Image) -> Any:
    """Return the value of an editor: a background, on which nothing is painted yet."""
    return {"background": image, "layers": [], "composite": image}


def _enlarged(labels: Image.Image, size: Size) -> Image.Image:
    """Return a painted label map as large as the canvas for an image of `size`."""
    return labels.resize(canvas_size(size)[::-1], Image.Resampling.NEAREST)


def _checked(sides: Sequence[float | None]) -> Size:
    """Return height and width as integers; raise ValueError unless both are above 0. Inputs may be empty."""
    height, width = (int(side or 0) for side in sides)
    if min(height, width) <= 0:
        raise ValueError("give height and width of the image first, in pixels")
    return height, width


def _filled(rows: list) -> list:
    return [row for row in rows if str(row[0] or "").strip()]


def _legend(colors: list[str], names: tuple[str, ...]) -> str:
    swatch = '<span class="swatch" style="background:{}"></span>{}'
    entries = (swatch.format(color, html.escape(name)) for color, name in zip(colors, names, strict=True))
    labels = "".join(f'<span class="label">{entry}</span>' for entry in entries)
    return f'<div class="legend">{labels}</div>'
