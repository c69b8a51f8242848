"""The layout of the page, and the functions that its buttons call; the work is done in `session.py`."""

import dataclasses
import html
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

from PIL import Image

from taming.sampling import Cancelled, SamplingOptions
from taming.web.panels import Panel, condition_panel, original_panel
from taming.web.progress import Jobs, side_by_side
from taming.web.request import MAX_IMAGES, Request
from taming.web.session import Generated, Loaded, Session
from taming.web.uploads import MAX_UPLOAD_PIXELS, BodyLimit, forbid_fetching

logger = logging.getLogger(__name__)

# least, most and step of options that are sliders, and the value at which they change nothing
SLIDERS = {
    "temperature": (0.1, 2.0, 0.05, 1.0), "top_p": (0.05, 1.0, 0.01, 1.0), "min_p": (0.0, 0.5, 0.01, 0.0),
    "guidance": (1.0, 10.0, 0.1, 1.0), "stride": (1, 16, 1, 1),
}
MAX_GALLERY = 100  # images that are shown to one visitor
CSS = """
.legend {display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px}
.label {display: inline-flex; align-items: center; gap: 5px; white-space: nowrap}
.swatch {width: 14px; height: 14px; border-radius: 3px; border: 1px solid #8888}
#details table {font-size: 13px; width: 100%; table-layout: fixed}
#details table, #details tr, #details td {border: none}
#details td {padding: 1px 8px; vertical-align: top; overflow-wrap: anywhere}
#details td:first-child {width: 9em; opacity: 0.7}
.problem {color: #c00; font-weight: 600}
.dark .problem {color: #f88}
#live img, #image img {width: 100%; height: 100%; object-fit: contain}
"""


def require_gradio() -> None:
    """Raise ValueError, with what to install, if gradio is missing."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the page needs gradio ({error}): pip install 'taming[demo]', or pip install -e '.[demo]'"
        ) from error


def build_page(session: Session) -> Any:
    """Return the page, a `gradio.Blocks`.

    Raises:
        ValueError: gradio is not installed.
    """
    require_gradio()
    import gradio as gr

    jobs = Jobs()
    with gr.Blocks(title="taming", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        chosen, history = gr.State(None), gr.State([])
        gr.Markdown("# taming\nImages from a trained transformer: choose a run, give a condition.")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=360):
                run = gr.Dropdown([], label="run", elem_id="run")
                about = gr.HTML(elem_id="about", padding=True)
                height, width, count = _sizes()
                here = gr.Column()
                with gr.Accordion("Complete an image", open=False, elem_id="completion"):
                    original, item = original_panel(session, chosen, [height, width])
                options = _options()
            with gr.Column(min_width=360):
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", interactive=False, elem_id="generate")
                    cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
                results = _results()

        outputs = [*results.values(), history, start, cancel]
        run.change(
            _choose(session, list(options)), run,
            [chosen, about, height, width, item, *options.values(), start],
            concurrency_id="load", show_progress="hidden",
        )
        page.load(_list_runs(session), None, run)
        gallery, details = results["gallery"], [results["details"], results["download"]]
        gallery.select(_select(), history, details, show_progress="hidden")
        _keep_track(jobs, page, start, cancel, results["status"])

        with here:
            @gr.render(inputs=chosen, show_progress="hidden")
            def conditions(name: str | None) -> None:
                if name is None:
                    return
                loaded = session.load(name)
                panels = [
                    condition_panel(session, loaded, condition, [height, width])
                    for condition in loaded.conditions
                ]
                inputs = [history, height, width, count, *options.values(), *original.components]
                inputs += [component for panel in panels for component in panel.components]
                start.click(
                    _generate(session, jobs, loaded, list(options), original, panels), inputs, outputs,
                    concurrency_limit=1, concurrency_id="generate", show_progress="hidden",
                )
                there = gr.Timer(0.05)  # ticks when all of this is on the page, and a click has an effect
                there.tick(
                    lambda: (gr.update(interactive=True), gr.Timer(active=False)), None, [start, there],
                    queue=False, show_progress="hidden",
                )
    return page


def _keep_track(jobs: Jobs, page: Any, start: Any, cancel: Any, status: Any) -> None:
    """Note which visitors wait for images, cancel, or have left."""
    import gradio as gr

    def wait(request: gr.Request) -> tuple:
        jobs.wait(request.session_hash)
        return "waiting for its turn", gr.update(interactive=True)

    def stop(request: gr.Request) -> None:
        jobs.cancel(request.session_hash)

    def leave(request: gr.Request) -> None:
        jobs.forget(request.session_hash)

    start.click(wait, None, [status, cancel], queue=False, show_progress="hidden")
    cancel.click(stop, None, None, queue=False)
    page.unload(leave)


def _sizes() -> tuple[Any, Any, Any]:
    """Return the inputs of height, width and number of images."""
    import gradio as gr

    with gr.Row():
        height, width = (
            gr.Number(64, label=f"{side}, pixels", precision=0, min_width=90, elem_id=side)
            for side in ("height", "width")
        )
        count = gr.Slider(
            1, MAX_IMAGES, 1, step=1, label="images", min_width=120, interactive=True, elem_id="count"
        )
    return height, width, count


def _options() -> dict[str, Any]:
    """Return the inputs of the fields of `SamplingOptions` that can differ between jobs, by their names."""
    import gradio as gr

    inputs: dict[str, Any] = {}
    # the precision, which has choices, is that of the session; an interval is not a number
    fields = [
        field for field in dataclasses.fields(SamplingOptions)
        if "choices" not in field.metadata and field.name != "guidance_interval"
    ]
    with gr.Accordion("Sampling", open=True):
        for i, field in enumerate(fields):
            if i % 2 == 0:
                row = gr.Row()  # two beside each other
            name, default = field.name, cast(Any, field.default)
            # interactive is not to be inferred: some inputs are changed when a run is chosen
            about: dict[str, Any] = {"label": name.replace("_", "-"), "info": field.metadata["help"]}
            about |= {"elem_id": about["label"], "interactive": True}
            with row:
                if name in SLIDERS:
                    low, high, step, neutral = SLIDERS[name]
                    inputs[name] = gr.Slider(low, high, neutral, step=step, **about)
                elif isinstance(default, bool):
                    inputs[name] = gr.Checkbox(default, **about)
                else:  # 0 where there is no default: no limit, any seed
                    precision = None if isinstance(default, float) else 0
                    inputs[name] = gr.Number(default or 0, precision=precision, minimum=0, **about)
    return inputs


def _results() -> dict[str, Any]:
    """Return the outputs: the image while it is generated, and the gallery below it."""
    import gradio as gr

    status = gr.HTML("", elem_id="status", min_height=24, padding=True)
    live = gr.Image(
        show_label=False, interactive=False, height=420, format="png", buttons=["fullscreen"], elem_id="live"
    )
    gr.HTML("Generated so far; click an image for its settings.", padding=True)
    return {
        "status": status,
        "live": live,
        "gallery": gr.Gallery(
            show_label=False, columns=5, height=230, buttons=[], fit_columns=False, allow_preview=False,
            object_fit="contain", interactive=False, elem_id="gallery",
        ),
        "details": gr.HTML("", elem_id="details", padding=True),
        "download": gr.DownloadButton(
            "Download this PNG, with its settings", visible=False, elem_id="download"
        ),
    }


def _list_runs(session: Session) -> Callable:
    """Return the event of opening a page: list the runs, and choose the first that can be used."""
    import gradio as gr

    def list_runs() -> Any:
        runs = session.runs()
        choices = [(f"{run.name} (no checkpoint yet)" if run.problem else run.name, run.name) for run in runs]
        usable = [run.name for run in runs if not run.problem]
        return gr.update(choices=choices, value=(usable or [runs[0].name])[0])

    return list_runs


def _choose(session: Session, names: list[str]) -> Callable:
    """Return the event of choosing a run: load it, and fit the inputs to it; `names` are the options."""
    import gradio as gr

    unchanged = {name: gr.skip() for name in names}
    wait = gr.update(interactive=False)

    def choose(name: str | None) -> Iterator[tuple]:
        # until the run is loaded, the button would use the one before
        yield None, "loading", *[gr.skip()] * 3, *unchanged.values(), wait
        try:
            loaded = session.load(name or "")
        except (ValueError, FileNotFoundError) as error:
            yield None, _problem(error), *[gr.skip()] * 3, *unchanged.values(), wait
            return
        changes = unchanged | {
            "top_k": gr.update(label=f"top-k (0: all {loaded.model.codebook_size})"),
            "stride": gr.update(maximum=loaded.model.coarse_shape()[1], value=1),
        }
        if loaded.model.null_token is not None:
            changes["guidance"] = gr.update(interactive=True, label="guidance")
        else:
            changes["guidance"] = gr.update(interactive=False, label="guidance (not here)", value=1.0)
        item = gr.update(visible=loaded.dataset is not None)
        yield name, _about(loaded), *loaded.resolution, item, *changes.values(), gr.skip()

    return choose


def _about(loaded: Loaded) -> str:
    """Describe a run in one line."""
    (height, width), given = loaded.resolution, ", ".join(condition.title for condition in loaded.conditions)
    what = "without a condition" if loaded.model.be_unconditional else f"given {given}"
    data = f"{len(loaded.dataset)} items to choose from" if loaded.dataset is not None else loaded.no_data
    text = f"step {loaded.step}, trained at {height}x{width} pixels {what}; {data}"
    return f"<span>{html.escape(text)}</span>"


def _problem(error: Exception) -> str:
    return f'<span class="problem">{html.escape(str(error))}</span>'


def _generate(
    session: Session, jobs: Jobs, loaded: Loaded, names: list[str], original: Panel, panels: list[Panel]
) -> Callable:
    """Return the event of the button, when it is its turn: generate, and show the progress."""
    import gradio as gr

    def read(height: int, width: int, count: int, *inputs: Any) -> Request:
        values = list(inputs)
        options = {name: values.pop(0) for name in names}
        image, mask = original.read(*[values.pop(0) for _ in original.components])
        conditions = {
            condition.key: panel.read(*[values.pop(0) for _ in panel.components])
            for condition, panel in zip(loaded.conditions, panels, strict=True)
        }
        if height is None or width is None:
            raise ValueError("give height and width of the image, in pixels")
        options["seed"] = int(options["seed"] or 0)
        options["top_k"] = options["top_k"] or None  # an emptied input, or 0
        return Request(
            loaded.run.name, (height, width), conditions, image, mask, count, SamplingOptions(**options)
        )

    def shown(status: Any = None, live: Any = None, *rest: Any) -> tuple:
        skipped = [gr.skip() if value is None else value for value in (status, live)]
        return *skipped, *(rest or [gr.skip()] * 3)

    ready = gr.update(interactive=True), gr.update(interactive=False)

    def generate(request: gr.Request, history: list[Generated], *values: Any) -> Iterator[tuple]:
        busy = gr.update(interactive=False), gr.update(interactive=True)
        job = jobs.begin(request.session_hash)
        yield *shown(), gr.skip(), *busy
        try:
            for news in session.generate(read(*values), job):
                if isinstance(news, list):
                    history = (news + history)[:MAX_GALLERY]
                    live = side_by_side([image.path for image in news])
                    gallery = [(str(image.path), _caption(image)) for image in history]
                    yield *shown("done", live, gallery, *_details(history[0])), history, *ready
                else:
                    yield *shown(html.escape(news.message), news.image), gr.skip(), *busy
        except Cancelled:
            yield *shown("cancelled"), gr.skip(), *ready
        except (ValueError, FileNotFoundError) as error:
            yield *shown(_problem(error)), gr.skip(), *ready
        except Exception as error:
            logger.exception("generation failed")
            yield *shown(_problem(RuntimeError(f"generation failed: {error}"))), gr.skip(), *ready
        finally:
            jobs.end(request.session_hash)

    return generate


def _caption(image: Generated) -> str:
    return f"seed {image.settings['seed']}"


def _details(image: Generated) -> tuple:
    """Return the table of settings and the download of one image."""
    import gradio as gr

    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>"
        for key, value in image.settings.items()
    )
    return f"<table>{rows}</table>", gr.update(value=str(image.path), visible=True)


def _select() -> Callable:
    """Return the event of clicking an image of the gallery."""
    import gradio as gr

    def select(history: list[Generated], event: gr.SelectData) -> tuple:
        return _details(history[event.index])

    return select


def launch(
    session: Session, *, host: str = "127.0.0.1", port: int | None = None, max_upload: float = 20.0,
    block: bool = True,
) -> str:
    """Serve the page until it is interrupted, and return its address; nothing else is contacted.

    Args:
        session: does the work. All files in its `outdir` can be downloaded by visitors, and no others.
        host: address to listen on; any but 127.0.0.1 lets other machines in.
        port: the first free one from 7860 when None.
        max_upload: largest file, in megabytes.
        block: wait for Ctrl-C; otherwise return at once.

    Raises:
        ValueError: gradio is not installed, there is no such host, or the port is taken.
    """
    check_address(host, port)
    page = build_page(session)
    forbid_fetching()
    import gradio as gr
    from starlette.middleware import Middleware

    # A second limit, for what gradio decodes by itself; Pillow raises from twice this number on.
    Image.MAX_IMAGE_PIXELS = min(Image.MAX_IMAGE_PIXELS or MAX_UPLOAD_PIXELS, MAX_UPLOAD_PIXELS)
    limit = int(max_upload * 1e6)
    font = ["system-ui", "sans-serif"]  # of the visitor's machine: none is fetched
    theme = gr.themes.Default(font=font, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.queue(max_size=64).launch(
            server_name=host, server_port=port, max_file_size=limit, allowed_paths=[str(session.outdir)],
            theme=theme, css=CSS, footer_links=[], share=False, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, quiet=True, prevent_thread_lock=True, inbrowser=False, show_error=False,
            # what a form adds around the file, and images that the page sends back as text
            app_kwargs={"middleware": [Middleware(BodyLimit, limit=2 * limit + 1_000_000)]},
        )
    except OSError as error:
        raise ValueError(_cannot_listen(host, port, error)) from error
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return address


def check_address(host: str, port: int | None) -> None:
    """Raise ValueError if nothing can listen on this host or port; gradio would wait instead."""
    try:
        address = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(*address[:3]) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address[4])
    except (OSError, UnicodeError) as error:
        raise ValueError(_cannot_listen(host, port, error)) from error


def _cannot_listen(host: str, port: int | None, error: Exception) -> str:
    place = f"{host}:{port}" if port else host
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot listen on {place} ({reason}): choose another --port or --host"
