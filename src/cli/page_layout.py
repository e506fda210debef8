"""Build the page: its components, and the request of `cli.page` that each button starts."""

import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from cli import user_message
from cli.page import EDITS, MAX_IMAGES, MAX_STEPS, MAX_TEXT, SETTINGS, Page
from cli.page_session import Session, Stopped
from demo import PROMPTS
from unclip.files import read_text
from unclip.sampling_run import Progress

WAITING = 8  # requests that can wait while another one is computed
UPLOAD = "20mb"
OTHER_PROMPTS = (  # for bundles that were not trained on emoji scenes
    "a corgi wearing a red bow tie and a purple party hat",
    "an oil painting of a lighthouse in a storm",
    "a bowl of soup that is a portal to another dimension",
    "a photo of a green vase on a wooden table",
)
BUSY = f"busy: {WAITING} requests are waiting already; try again in a minute"
STOPPED = "stopped; finished images are kept"
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="stone",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_background_color_selected="*primary_700",
    slider_color="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    body_background_fill="*neutral_100",
    block_title_background_fill="transparent",
    block_title_text_color="*body_text_color",
    block_title_padding="0",
    block_label_background_fill="*block_background_fill",
    block_label_background_fill_dark="*block_background_fill",
    block_label_text_color="*body_text_color",
    block_label_text_color_dark="*body_text_color",
)

STYLE = Path(__file__).with_suffix(".css")

Components = Mapping[str, gr.components.Component]


class Job(NamedTuple):
    """The button that starts a request, the one that stops it, and the line about its progress."""

    start: gr.Button
    stop: gr.Button
    status: gr.HTML


def serve(page: Page, host: str, port: int | None) -> None:
    """Serve the page until Ctrl-C."""
    blocks = Layout(page).blocks
    blocks.queue(max_size=2 * WAITING, default_concurrency_limit=1)
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=UPLOAD,
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        theme=THEME,
        head=f"<style>{read_text(STYLE)}</style>",  # `css` would prefix the selectors in @media
        _frontend=False,  # skips a check that fails if the first request takes three seconds
    )
    print(f"Open {url} in a browser; Ctrl-C stops the page.", flush=True)
    try:
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)


class Layout:
    """The page's components and events, in `blocks`."""

    def __init__(self, page: Page):
        self.page = page
        self.prompts = list(PROMPTS[:6] if page.concept_set else OTHER_PROMPTS)
        self.blocks = gr.Blocks(title="unclip", analytics_enabled=False, delete_cache=(600, 86400))
        with self.blocks:
            self._header()
            self.input = _image("Image", render=False)
            self.strip = gr.Gallery(
                label="Images of this session",
                show_label=False,
                columns=6,
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_classes="strip",
                render=False,
            )
            with gr.Tabs() as self.tabs:
                with gr.Tab("Create", id="create"):
                    self._create()
                with gr.Tab("Edit", id="edit"):
                    self._edit()
                with gr.Tab("Compare", id="compare"):
                    self._compare()
                with gr.Tab("Look inside", id="inside"):
                    self._inside()
            outputs = [self.tabs, self.operation, *self.fresh]
            outputs += [*self.created.values(), *self.edited.values()]
            outputs = list(dict.fromkeys(outputs))
            self.file.upload(self._restore, self.file, outputs, **_FAILING)
            self.blocks.unload(self._forget)

    def _forget(self, request: gr.Request) -> None:
        self.page.forget(str(request.session_hash))

    def _header(self) -> None:
        cascade, sizes = self.page.cascade, " → ".join(map(str, self.page.sizes))
        name = escape(cascade.folder.resolve().name)
        about = f"From captions to images with the bundle <b>{name}</b>: {sizes} pixels"
        gr.HTML(f"<h1>unclip</h1><p>{about}, on {cascade.device}.</p>", elem_classes="header")

    def _create(self) -> None:
        page = self.page
        with gr.Row(elem_classes="prompt"):
            prompt = _text("Prompt", placeholder=self.prompts[0], scale=6, autofocus=True)
            job = _job("Generate")
        job.status.render()
        examples = gr.Examples(self.prompts, prompt, cache_examples=False, api_visibility="private")
        if page.about:
            with gr.Accordion("What this model knows", open=False):
                gr.Markdown(page.about)
        with gr.Row(elem_classes="workspace"):
            with gr.Column(scale=1, min_width=280):
                count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
                seed, fresh = _seed()
                guidance = gr.Slider(
                    1,
                    max(8, 2 * page.guidance_scale),
                    page.guidance_scale,
                    step=0.1,
                    label="Guidance",
                    info="How closely the decoder follows its input; 1 is none.",
                )
                prior = gr.Radio(
                    page.priors,
                    value=page.priors[0],
                    label="Prior",
                    info="Predicts the image embedding; none uses the text embedding.",
                )
                size = self._size()
                with gr.Accordion("Advanced", open=False):
                    advanced = {
                        "prior_steps": _optional("Prior steps"),
                        "decoder_steps": _optional("Decoder steps"),
                        "prior_guidance": _optional("Prior guidance", precision=None),
                    }
                self.file = gr.File(
                    label="Restore from a PNG",
                    file_types=[".png"],
                    height=120,
                )
            with gr.Column(scale=3, min_width=320, elem_classes="results"):
                images = _gallery("Images")
                use = gr.Button("Edit the selected image", visible=False)
        self.created: Components = {
            "prompt": prompt,
            "count": count,
            "seed": seed,
            "guidance": guidance,
            "prior": prior,
            "size": size,
            **advanced,
        }
        self.fresh = [fresh]
        triggers = [job.start.click, prompt.submit, examples.load_input_event.then]
        self._connect(job, page.create, self.created, [images], fresh, triggers, use)
        self._use(images, use)
        self._endpoint()

    def _edit(self) -> None:
        self.operation = operation = gr.Radio(list(EDITS), value="Variations", label="Edit")
        with gr.Row(elem_classes="workspace"):
            with gr.Column(scale=2, min_width=320):
                with gr.Row():
                    self.input.render()
                    second = _image("Second image", visible=False)
                gr.Markdown("Or choose an image of this session:", elem_classes="hint")
                self.strip.render()
                painting = gr.ImageEditor(
                    label="Paint to replace",
                    type="pil",
                    sources=[],
                    transforms=[],
                    layers=False,
                    brush=gr.Brush(colors=["#ff3ea5"], color_mode="fixed", default_size=60),
                    buttons=["fullscreen"],
                    height=420,
                    visible=False,
                )
                text = {
                    "source": _text("Old text", placeholder="what the image shows; optional"),
                    "target": _text("New text", placeholder="what it should show"),
                    "prompt": _text("Prompt", placeholder="the whole result; optional"),
                }
                numbers = {
                    "strength": gr.Slider(0.05, 1, 0.5, step=0.05, label="Strength"),
                    "margin": gr.Slider(0.05, 1, 0.25, step=0.05, label="Margin"),
                    "count": gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images"),
                    "frames": gr.Slider(2, MAX_IMAGES, 6, step=1, label="Frames"),
                    "eta": gr.Slider(
                        0, 1, 0.5, step=0.05, label="Change", info="0 reconstructs the image."
                    ),
                    "noise": gr.Radio(
                        ["slerp", "fixed"],
                        value="slerp",
                        label="Noise",
                        info="slerp ends in reconstructions; fixed samples one noise for all.",
                    ),
                }
                seed, fresh = _seed()
                size = self._size()
                with gr.Accordion("Advanced", open=False):
                    guidance = _optional("Guidance", precision=None)
                    steps = _optional("Decoder steps")
                job = _job("Edit")
                job.status.render()
            with gr.Column(scale=3, min_width=320, elem_classes="results"):
                images = _gallery("Results")
                frame = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False)
                with gr.Row():
                    use = gr.Button("Edit the selected image", visible=False)
                    gif = gr.DownloadButton("Animation (GIF)", visible=False)
                    archive = gr.DownloadButton("All with inputs (ZIP)", visible=False)
        optional = {**text, **numbers}
        self.edited: Components = {
            "image": self.input,
            "second": second,
            **optional,
            "seed": seed,
            "size": size,
            "guidance": guidance,
            "decoder_steps": steps,
        }
        self.fresh.append(fresh)
        controls = {"operation": operation, "painting": painting, **self.edited}
        self._connect(
            job, self._edits, controls, [images, frame, gif, archive], fresh, [job.start.click], use
        )
        self._use(images, use)
        _quick(frame.input, lambda number: gr.Gallery(selected_index=number - 1), [frame], images)

        def show(operation: str) -> list[Any]:
            uses = EDITS[operation][1]
            extra = [operation == "Interpolate", operation == "Inpaint"]
            return [gr.update(visible=one) for one in [*extra, *(key in uses for key in optional)]]

        def paint(operation: str, image: str | None) -> Any:
            if operation != "Inpaint" or image is None:
                return None
            return {"background": image, "layers": [], "composite": None}

        shown = [second, painting, *optional.values()]
        operation.change(show, operation, shown, **_FREE).then(
            paint, [operation, self.input], painting, **_FREE
        )
        self.input.change(paint, [operation, self.input], painting, **_FREE)
        self.blocks.load(show, operation, shown, **_FREE)

        def choose(
            event: gr.SelectData, operation: str, image: str | None, request: gr.Request
        ) -> list[Any]:
            path = str(self.page.session(str(request.session_hash)).images[event.index])
            is_second = operation == "Interpolate" and image is not None
            return [gr.skip(), path] if is_second else [path, gr.skip()]

        self.strip.select(choose, [operation, self.input], [self.input, second], **_FREE)

    def _edits(self, session: Session, progress: Any, **controls: Any) -> Iterator[list[Any]]:
        for made in self.page.edit(session, progress, **controls):
            frames = made.gif is not None
            yield [
                gr.Gallery(made.images, selected_index=0 if frames else None),
                gr.Slider(maximum=max(2, len(made.images)), value=1, visible=frames),
                gr.DownloadButton(value=made.gif, visible=frames),
                gr.DownloadButton(value=made.archive, visible=True),
            ]

    def _compare(self) -> None:
        defaults = {
            "guidance": "1, 2, 4, 8",
            "decoder steps": "2, 5, 10, 20",
            "prior": ", ".join(self.page.priors),
            "seed": "0, 1, 2, 3",
            "prior guidance": "1, 2, 4",
            "prior steps": "2, 5, 10, 20",
        }
        prompt = _text("Prompt", value=self.prompts[1])
        with gr.Row():
            axes: dict[str, Any] = {}
            for axis, setting in (("columns", "guidance"), ("rows", "decoder steps")):
                with gr.Column(min_width=280):
                    name = axes[axis] = gr.Dropdown(
                        list(SETTINGS), value=setting, label=axis.capitalize()
                    )
                    values = axes[f"{axis[:-1]}_values"] = gr.Textbox(
                        defaults[setting], label=f"Values of the {axis}", max_length=MAX_TEXT
                    )
                    _quick(name.input, defaults.get, [name], values)
        with gr.Row():
            with gr.Column(min_width=280):
                seed, fresh = _seed()
            with gr.Column(min_width=280):
                size = self._size(256)
        job = _job("Compare")
        job.status.render()
        sheet = gr.Image(
            label="Sheet",
            show_label=False,
            type="filepath",
            interactive=False,
            buttons=_BUTTONS,
            elem_classes="results",
        )
        controls = {"prompt": prompt, **axes, "seed": seed, "size": size}
        triggers = [job.start.click, prompt.submit]
        self._connect(job, self.page.compare, controls, [sheet], fresh, triggers)

    def _inside(self) -> None:
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown(
                    "### The importance of the prior\n"
                    "The decoder starts from the caption only, from its text embedding z_t in "
                    "place of an image embedding, and from the prior's image embedding z_i."
                )
                prompt = _text("Prompt", value=self.prompts[0])
                prior_seed, prior_fresh = _seed()
                prior_size = self._size()
                prior_job = _job("Compare inputs")
                prior_job.status.render()
                prior_images = _gallery("Decoder inputs", columns=3)
            with gr.Column(min_width=320):
                gr.Markdown(
                    "### Principal components of an embedding\n"
                    "The image's embedding is reduced to its first principal components, and "
                    "decoded from the same noise."
                )
                image = _image("Your image")
                use = gr.Button("Take the image of Edit", size="sm")
                seed, fresh = _seed()
                size = self._size(256)
                job = _job("Reduce")
                job.status.render()
                images = _gallery("Components kept", columns=3)
        _quick(use.click, lambda path: path, [self.input], image)
        controls = {"prompt": prompt, "seed": prior_seed, "size": prior_size}
        triggers = [prior_job.start.click, prompt.submit]
        self._connect(
            prior_job, self.page.importance, controls, [prior_images], prior_fresh, triggers
        )
        controls = {"image": image, "seed": seed, "size": size}
        self._connect(job, self.page.components, controls, [images], fresh, [job.start.click])

    def _size(self, largest: int = 1024) -> gr.Radio:
        sizes = self.page.sizes
        return gr.Radio(sizes, value=min(largest, max(sizes)), label="Size in pixels")

    def _connect(
        self,
        job: Job,
        call: Callable[..., Iterator[Any]],
        controls: Components,
        outputs: Sequence[gr.components.Component],
        fresh: gr.Checkbox,
        triggers: Sequence[Callable[..., Any]],
        use: gr.Button | None = None,
    ) -> None:
        """Start a request by each of the triggers: begin, compute, finish.

        Args:
            job: the buttons and the status line.
            call: a request of `Page`; it receives a session, a progress callback and the controls.
            controls: components by the request's arguments, "seed" among them.
            outputs: the components that it fills.
            fresh: whether a new seed is sampled first.
            triggers: events of the components that start the request.
            use: button that takes over a result, visible as soon as there is one.
        """
        after = [job.start, job.stop, self.strip, *([use] if use else [])]

        def begin(fresh: bool, seed: int, request: gr.Request) -> list[Any]:
            if len(self.blocks._queue) >= WAITING:
                raise gr.Error(BUSY, print_exception=False)
            self.page.session(str(request.session_hash)).stopped = False
            seed = random.randrange(10**6) if fresh or seed is None else seed
            return [gr.update(visible=False), gr.update(visible=True), "", seed]

        def compute(
            request: gr.Request, progress: gr.Progress = _PROGRESS, **values: Any
        ) -> Iterator[list[Any]]:
            session, started = self.page.session(str(request.session_hash)), time.perf_counter()
            report, unchanged = _reporter(session, progress), [gr.skip()] * len(outputs)
            try:
                for shown in self.page.compute(report, call(session, report, **values), gr.Warning):
                    line = f"{time.perf_counter() - started:.1f} s · seed {values['seed']}"
                    yield [line, *(shown if len(outputs) > 1 else [shown])]
            except Stopped:
                yield [STOPPED, *unchanged]
            except Exception as error:
                yield [f'<span role="alert">{escape(_message(error))}</span>', *unchanged]

        def finish(request: gr.Request) -> list[Any]:
            images = self.page.session(str(request.session_hash)).images
            buttons = [gr.update(visible=True), gr.update(visible=False)]
            return [*buttons, images, *([gr.update(visible=bool(images))] if use else [])]

        def stop(request: gr.Request) -> None:
            self.page.session(str(request.session_hash)).stopped = True

        for trigger in triggers:
            trigger(begin, [fresh, controls["seed"]], [*job, controls["seed"]], **_FAILING).success(
                compute,
                inputs_kwargs=controls,
                outputs=[job.status, *outputs],
                concurrency_id="model",
                show_progress_on=job.status,
                api_visibility="private",
            ).then(finish, None, after, **_FREE)
        job.stop.click(stop, None, None, **_FREE)

    def _use(self, images: gr.Gallery, use: gr.Button) -> None:
        """Make a button pass the selected image of a gallery, or the first one, to the tab Edit."""
        chosen = gr.State(0)

        def select(event: gr.SelectData) -> int:
            return event.index

        def pass_on(shown: list[tuple[str, str]], index: int) -> list[Any]:
            return [shown[min(index, len(shown) - 1)][0], gr.Tabs(selected="edit")]

        images.select(select, None, chosen, **_FREE)
        _quick(use.click, pass_on, [images, chosen], [self.input, self.tabs])

    def _endpoint(self) -> None:
        """Add the endpoint for programs, which has the limits of the page."""

        def text_to_image(
            browser: gr.Request,
            prompt: str,
            count: int,
            seed: int,
            guidance: float,
            prior: str,
            size: int,
            prior_steps: int | None = None,
            decoder_steps: int | None = None,
            prior_guidance: float | None = None,
        ) -> list[str]:
            controls = {key: value for key, value in locals().items() if key in self.created}
            session = self.page.session(str(browser.session_hash))
            report = _reporter(session, lambda *_, **__: None)
            try:
                request = self.page.create(session, report, **controls)
                *_, images = self.page.compute(report, request, gr.Warning)
            except Exception as error:
                raise gr.Error(_message(error), print_exception=False) from error
            return [str(path) for path, _ in images]

        gr.Button(visible=False).click(
            text_to_image,
            list(self.created.values()),
            gr.Files(visible=False),
            concurrency_id="model",
            show_progress="hidden",
        )

    def _restore(self, file: str, request: gr.Request) -> dict[Any, Any]:
        """Set the controls to those of a PNG, and open the tab that made it."""
        try:
            command, values = self.page.restore(file)
            if not self.page.same_bundle(file):
                gr.Warning("another bundle made this image: this one makes a different image")
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        is_edit = command in (name for name, _ in EDITS.values())
        controls = self.edited if is_edit else self.created
        if not is_edit and values.get("guidance") is None:  # a slider has no empty value
            values["guidance"] = self.page.guidance_scale
        updates = {controls[key]: value for key, value in values.items() if key in controls}
        updates[self.tabs] = gr.Tabs(selected="edit" if is_edit else "create")
        if is_edit:
            names = [name for name, (own, uses) in EDITS.items() if own == command]
            updates[self.operation] = names["margin" in values and values["margin"] is not None]
            gr.Info("settings restored; choose the image that was edited")
        return updates | dict.fromkeys(self.fresh, False)


_FREE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_FAILING = {**_FREE, "queue": True, "concurrency_limit": None}  # its errors are shown
_PROGRESS = gr.Progress()
_BUTTONS = ["download", "fullscreen"]


def _quick(event: Callable[..., Any], fn: Callable[..., Any], inputs: Any, outputs: Any) -> None:
    event(fn, inputs, outputs, **_FREE)


def _reporter(session: Session, progress: Callable[..., Any]) -> Progress:
    """Return a progress callback that raises `Stopped` in a session that was stopped."""

    def report(stage: str, step: int, steps: int) -> None:
        if session.stopped:
            raise Stopped
        progress((step, steps), desc=stage, unit="network evaluations")

    return report


def _message(error: Exception) -> str:
    """Return what to show of an error; an unexpected one is printed in the terminal."""
    try:
        return user_message(error)
    except Exception:
        traceback.print_exception(error)
        return "unexpected error: the terminal shows it"


def _job(label: str) -> Job:
    with gr.Column(min_width=220, elem_classes="job"):
        start = gr.Button(label, variant="primary")
        stop = gr.Button("Stop", variant="stop", visible=False)
    return Job(start, stop, gr.HTML(elem_classes="status", render=False))


def _text(label: str, **options: Any) -> gr.Textbox:
    return gr.Textbox(label=label, max_length=MAX_TEXT, **options)


def _seed() -> tuple[gr.Number, gr.Checkbox]:
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=120)
        fresh = gr.Checkbox(True, label="New seed each time", min_width=120)
    return seed, fresh


def _optional(label: str, precision: int | None = 0) -> gr.Number:
    largest = MAX_STEPS if precision == 0 else None
    return gr.Number(
        None, label=label, placeholder="the model's own", precision=precision, maximum=largest
    )


def _image(label: str, **options: Any) -> gr.Image:
    image = gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], height=260, **options
    )
    # Gradio would decode the file, and fail with an error of its own.
    image.preprocess = lambda payload: payload and payload.path
    return image


def _gallery(label: str, columns: int = 2) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=columns,
        object_fit="contain",
        height="auto",
        interactive=False,
        buttons=_BUTTONS,
        elem_classes="images",
    )
