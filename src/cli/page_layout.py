"""Build the page: its components, and the request of `cli.page` that each button starts."""

import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from cli import user_message
from cli.page import EDITS, MAX_BEST_OF, MAX_IMAGES, Page
from cli.page_controls import make_gallery, make_image, make_job, make_number, make_seed, make_text
from cli.page_session import Session, Stopped
from demo import PROMPTS
from unclip.sampling_run import Progress

WAITING = 8  # requests that can wait while another one is computed
OTHER_PROMPTS = (  # for bundles that were not trained on emoji scenes
    "a corgi wearing a red bow tie and a purple party hat",
    "an oil painting of a lighthouse in a storm",
    "a bowl of soup that is a portal to another dimension",
    "a photo of a green vase on a wooden table",
)
BUSY = f"busy: {WAITING} requests are waiting already; try again in a minute"
RUNNING = "your last request is still running: wait for it, or stop it"
HEAD = Path(__file__).with_name("page_head.html")  # styles, and the drop of a PNG on the page
FONT = ["system-ui", "sans-serif"]
_PROGRESS = gr.Progress()

# Options of events: those that cannot fail, and those whose errors are shown.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
FAILING = {**QUICK, "queue": True, "concurrency_limit": None}

Component = gr.components.Component
Controls = dict[str, Component]
Request = Callable[..., Iterator[Any]]
Event = Callable[..., Any]


def serve(page: Page, host: str, port: int | None) -> None:
    """Serve the page until Ctrl-C."""
    blocks = Layout(page).blocks
    blocks.queue(max_size=2 * WAITING, default_concurrency_limit=1)
    off: dict[str, Any] = dict.fromkeys(("share", "run_history", "enable_monitoring"), False)
    off |= dict.fromkeys(("ssr_mode", "mcp_server"), False)
    off["_frontend"] = False  # skips a check that fails if the first request takes three seconds
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size="20mb",
        footer_links=[],
        theme=gr.themes.Soft(primary_hue="teal", neutral_hue="stone", font=FONT, font_mono=FONT),
        head_paths=HEAD,  # `css_paths` would prefix the selectors in @media
        **off,
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
            self.input = make_image("Image", height=260, render=False)
            strip: dict[str, Any] = {"allow_preview": False, "elem_classes": "strip"}
            self.strip = make_gallery("Images of this session", **strip, render=False)
            tabs = {"Create": self._create, "Edit": self._edit, "Compare": self._compare}
            with gr.Tabs() as self.tabs:
                for name, build in {**tabs, "Look inside": self._inside}.items():
                    with gr.Tab(name, id=name):
                        build()
            outputs = {self.tabs, *self.created.values(), *self.edited.values()}
            self.file.upload(self._restore, self.file, outputs, **FAILING)
            self.blocks.unload(self._forget)

    def _session(self, request: gr.Request) -> Session:
        return self.page.session(str(request.session_hash))

    def _forget(self, request: gr.Request) -> None:
        self.page.forget(str(request.session_hash))

    def _header(self) -> None:
        cascade, sizes = self.page.cascade, " → ".join(map(str, self.page.sizes))
        name = escape(cascade.folder.resolve().name)
        about = f"From captions to images with the bundle <b>{name}</b>: {sizes} pixels"
        with gr.Row():
            gr.HTML(f"<h1>unclip</h1><p>{about}, on {cascade.device}.</p>", elem_classes="header")
            label = "Restore from a PNG: click, or drop it on the page"
            options: dict[str, Any] = {"scale": 0, "min_width": 340, "elem_classes": "restore"}
            self.file = gr.UploadButton(label, file_types=[".png"], size="sm", **options)

    def _create(self) -> None:
        page, scale = self.page, self.page.guidance_scale
        follows = "How closely the decoder follows its input; 1 is none."
        predicts = "Predicts the image embedding; none uses the text embedding."
        keeps = "Candidates for each image; CLIP keeps those that match the prompt best."
        with gr.Row():
            prompt = make_text("Prompt", placeholder=self.prompts[0], scale=4, autofocus=True)
            job = make_job("Generate")
        examples = gr.Examples(self.prompts, prompt, cache_examples=False, api_visibility="private")
        if page.about:
            with gr.Accordion("What this model knows", open=False):
                gr.Markdown(page.about)
        with gr.Row(elem_classes="workspace"):
            with gr.Column(scale=1, min_width=280):
                self.created: Controls = {
                    "prompt": prompt,
                    "count": gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images"),
                    "best_of": gr.Slider(1, MAX_BEST_OF, 1, step=1, label="Best of", info=keeps),
                    **make_seed(),
                    "guidance": gr.Slider(
                        1, max(8, 2 * scale), scale, step=0.1, label="Guidance", info=follows
                    ),
                    "prior": gr.Radio(
                        page.priors, value=page.priors[0], label="Prior", info=predicts
                    ),
                    "size": self._size(),
                }
                with gr.Accordion("Advanced", open=False):
                    for label in ("Prior steps", "Decoder steps", "Prior guidance"):
                        self.created[label.lower().replace(" ", "_")] = make_number(label)
            with gr.Column(scale=3, min_width=320, elem_classes="results"):
                images = self._results("Images")
        triggers = [prompt.submit, examples.load_input_event.then]
        self._connect(job, page.create, self.created, [images], triggers)
        self._endpoint()

    def _edit(self) -> None:
        operation = gr.Radio(list(EDITS), value="Variations", label="Edit")
        with gr.Row(elem_classes="workspace"):
            with gr.Column(scale=2, min_width=320):
                with gr.Row():
                    self.input.render()
                    second = make_image("Second image", height=260)
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
                    elem_classes="input",
                )
                optional: Controls = {
                    "second": second,
                    "painting": painting,
                    "source": make_text("Old text", placeholder="what the image shows; optional"),
                    "target": make_text("New text", placeholder="what it should show"),
                    "prompt": make_text("Prompt", placeholder="the whole result; optional"),
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
                for key, component in optional.items():
                    component.visible = key in EDITS["Variations"][1]
                controls = {"operation": operation, "image": self.input, **optional}
                self.edited = {**controls, **make_seed(), "size": self._size()}
                with gr.Accordion("Advanced", open=False):
                    self.edited["guidance"] = make_number("Guidance")
                    self.edited["decoder_steps"] = make_number("Decoder steps")
                job = make_job("Edit")
            with gr.Column(scale=3, min_width=320, elem_classes="results"):
                images = self._results("Results")
                frame = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False)
                with gr.Row():
                    gif = gr.DownloadButton("Animation (GIF)", visible=False)
                    archive = gr.DownloadButton("All with inputs (ZIP)", visible=False)
        self._connect(job, self._edits, self.edited, [images, frame, gif, archive])
        _quick(frame.input, lambda number: gr.Gallery(selected_index=number - 1), [frame], images)

        def show(operation: str) -> list[Any]:
            return [gr.update(visible=key in EDITS[operation][1]) for key in optional]

        def paint(operation: str, image: str | None) -> Any:
            if operation != "Inpaint" or image is None:
                return None
            return {"background": image, "layers": [], "composite": None}

        def choose(
            event: gr.SelectData, operation: str, image: str | None, request: gr.Request
        ) -> list[Any]:
            path = str(self._session(request).images[event.index])
            is_second = operation == "Interpolate" and image is not None
            return [gr.skip(), path] if is_second else [path, gr.skip()]

        shown, painted = list(optional.values()), [operation, self.input]
        operation.change(show, operation, shown, **QUICK).then(paint, painted, painting, **QUICK)
        _quick(self.input.change, paint, painted, painting)
        _quick(self.strip.select, choose, painted, [self.input, second])

    def _edits(self, session: Session, progress: Progress, **controls: Any) -> Iterator[list[Any]]:
        for made in self.page.edit(session, progress, **controls):
            frames = made.gif is not None
            yield [
                gr.Gallery(made.images, selected_index=0 if frames else None),
                gr.Slider(maximum=max(2, len(made.images)), value=1, visible=frames),
                gr.DownloadButton(value=made.gif, visible=frames),
                gr.DownloadButton(value=made.archive, visible=True),
            ]

    def _compare(self) -> None:
        values = {"guidance": "1, 2, 4, 8", "decoder steps": "2, 5, 10, 20", "seed": "0, 1, 2, 3"}
        values |= {"prior guidance": "1, 2, 4", "prior steps": "2, 5, 10, 20"}
        values["prior"] = ", ".join(self.page.priors)
        prompt = make_text("Prompt", value=self.prompts[1])
        controls: Controls = {"prompt": prompt}
        with gr.Row():
            for axis, setting in (("columns", "guidance"), ("rows", "decoder steps")):
                with gr.Column(min_width=280):
                    name = gr.Dropdown(list(values), value=setting, label=axis.capitalize())
                    line = make_text(f"Values of the {axis}", value=values[setting])
                    controls |= {axis: name, f"{axis[:-1]}_values": line}
                    _quick(name.input, values.get, [name], line)
        with gr.Row():
            with gr.Column(min_width=280):
                controls |= make_seed()
            with gr.Column(min_width=280):
                controls["size"] = self._size(256)
        job = make_job("Compare")
        sheet = make_image("Sheet", show_label=False, interactive=False, elem_classes="results")
        self._connect(job, self.page.compare, controls, [sheet], [prompt.submit])

    def _inside(self) -> None:
        page = self.page
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown(
                    "### The importance of the prior\n"
                    "The decoder starts from the caption only, from its text embedding z_t in "
                    "place of an image embedding, and from the prior's image embedding z_i."
                )
                prompt = make_text("Prompt", value=self.prompts[0])
                self._look("Compare inputs", page.importance, "prompt", prompt, [prompt.submit])
            with gr.Column(min_width=320):
                gr.Markdown(
                    "### Principal components of an embedding\n"
                    "The image's embedding is reduced to its first principal components, and "
                    "decoded from the same noise."
                )
                image = make_image("Your image", height=260)
                take = gr.Button("Take the image of Edit", size="sm")
                _quick(take.click, lambda path: path, [self.input], image)
                self._look("Reduce", page.components, "image", image)

    def _look(
        self, label: str, call: Request, key: str, given: Component, triggers: Sequence[Event] = ()
    ) -> None:
        controls = {key: given, **make_seed(), "size": self._size(256)}
        self._connect(make_job(label), call, controls, [make_gallery(label, 3)], triggers)

    def _size(self, largest: int = 1024) -> gr.Radio:
        sizes = self.page.sizes
        return gr.Radio(sizes, value=min(largest, max(sizes)), label="Size in pixels")

    def _results(self, label: str) -> gr.Gallery:
        """Make a gallery, and a button that passes its selected image, or the first, to Edit."""
        images, chosen = make_gallery(label), gr.State(0)
        use = gr.Button("Edit the selected image", elem_classes="use")

        def select(event: gr.SelectData) -> int:
            return event.index

        def pass_on(shown: list[tuple[str, str]], index: int) -> list[Any]:
            return [shown[min(index, len(shown) - 1)][0], gr.Tabs(selected="Edit")]

        _quick(images.select, select, None, chosen)
        _quick(use.click, pass_on, [images, chosen], [self.input, self.tabs])
        return images

    def _connect(
        self,
        job: tuple[gr.Button, gr.Button, gr.HTML],
        call: Request,
        controls: Controls,
        outputs: Sequence[Component],
        triggers: Sequence[Event] = (),
    ) -> None:
        """Start a request by a button, or by another trigger: begin, compute, finish."""
        button, stop_button, status = job

        def begin(fresh: bool, seed: int | None, request: gr.Request) -> list[Any]:
            session = self._session(request)
            if session.running or len(self.blocks._queue) >= WAITING:
                raise gr.Error(RUNNING if session.running else BUSY, print_exception=False)
            session.running, session.stopped = True, False
            seed = random.randrange(10**6) if fresh or seed is None else seed
            return [gr.update(visible=False), gr.update(visible=True), "", seed]

        def compute(
            request: gr.Request, progress: gr.Progress = _PROGRESS, **values: Any
        ) -> Iterator[list[Any]]:
            session, started = self._session(request), time.perf_counter()
            report, unchanged = _reporter(session, progress), [gr.skip()] * len(outputs)
            del values["fresh"]
            try:
                for shown in self.page.compute(report, call(session, report, **values), gr.Warning):
                    line = f"{time.perf_counter() - started:.1f} s · seed {values['seed']}"
                    yield [line, *(shown if len(outputs) > 1 else [shown])]
            except Stopped:
                yield ["stopped; finished images are kept", *unchanged]
            except Exception as error:
                yield [f'<span role="alert">{escape(_message(error))}</span>', *unchanged]

        def finish(request: gr.Request) -> list[Any]:
            session = self._session(request)
            session.running = False
            return [gr.update(visible=True), gr.update(visible=False), session.images]

        def stop(request: gr.Request) -> None:
            self._session(request).stopped = True

        seeds = [controls["fresh"], controls["seed"]]
        for trigger in (button.click, *triggers):
            trigger(begin, seeds, [*job, controls["seed"]], **FAILING).success(
                compute,
                inputs_kwargs=controls,
                outputs=[status, *outputs],
                concurrency_id="model",
                show_progress_on=status,
                api_visibility="private",
            ).then(finish, None, [button, stop_button, self.strip], **QUICK)
        _quick(stop_button.click, stop, None, None)

    def _endpoint(self) -> None:
        """Add the endpoint for programs, which has the limits of the page."""

        def text_to_image(browser: gr.Request, **controls: Any) -> list[str]:
            session = self._session(browser)
            report = _reporter(session, lambda *_, **__: None)
            try:
                request = self.page.create(session, report, **controls)
                *_, images = self.page.compute(report, request, gr.Warning)
            except Exception as error:
                raise gr.Error(_message(error), print_exception=False) from error
            return [str(path) for path, _ in images]

        gr.Button(visible=False).click(
            text_to_image,
            inputs_kwargs={key: one for key, one in self.created.items() if key != "fresh"},
            outputs=gr.Files(visible=False),
            preprocess=False,  # would fail without a message if a type is wrong
            concurrency_id="model",
            show_progress="hidden",
        )

    def _restore(self, file: str, request: gr.Request) -> dict[Any, Any]:
        """Set the controls to those of a PNG, and open the tab that made it."""
        try:
            command, values, notes = self.page.restore(self._session(request), file)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        edits = [name for name, (own, _) in EDITS.items() if own == command]
        controls = self.edited if edits else self.created
        if edits:
            values["operation"] = edits[values.get("margin") is not None]
        elif values.get("guidance") is None:  # a slider has no empty value
            values["guidance"] = self.page.guidance_scale
        if notes:
            gr.Warning("; ".join(["settings restored", *notes]), duration=None)
        else:
            gr.Info("settings restored")
        updates = {controls[key]: one for key, one in values.items() if key in controls}
        opened = gr.Tabs(selected="Edit" if edits else "Create")
        return updates | {controls["fresh"]: False, self.tabs: opened}


def _quick(event: Event, fn: Callable[..., Any], inputs: Any, outputs: Any) -> None:
    event(fn, inputs, outputs, **QUICK)


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
