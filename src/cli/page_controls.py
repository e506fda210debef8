"""The kinds of controls on the page."""

from typing import Any

import gradio as gr

from cli.page import MAX_TEXT

BUTTONS = ["download", "fullscreen"]


def make_job(label: str) -> tuple[gr.Button, gr.Button, gr.HTML]:
    """Make the buttons that start and stop a request, with a line about its progress below."""
    with gr.Column(min_width=260, elem_classes="job"):
        start = gr.Button(label, variant="primary")
        stop = gr.Button("Stop", variant="stop", visible=False)
        return start, stop, gr.HTML(elem_classes="status")


def make_text(label: str, **options: Any) -> gr.Textbox:
    """Make a line for a text."""
    return gr.Textbox(label=label, max_length=MAX_TEXT, **options)


def make_number(label: str) -> gr.Textbox:
    """Make a line for a number that can be left empty; Gradio's number would turn it into 0."""
    return make_text(label, value="", placeholder="the model's own")


def make_seed() -> dict[str, gr.components.Component]:
    """Make the seed, and the choice to sample a new one for each request; typing a seed ends it."""
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        fresh = gr.Checkbox(True, label="New seed each time", min_width=120)
    seed.input(None, None, fresh, js="() => false", api_visibility="private")
    return {"seed": seed, "fresh": fresh}


def make_image(label: str, **options: Any) -> gr.Image:
    """Make an image; the file of an input is checked when a request starts."""
    defaults = {"type": "filepath", "elem_classes": "input", "buttons": BUTTONS}
    image = gr.Image(label=label, sources=["upload", "clipboard"], **{**defaults, **options})
    # Gradio would decode the file, and fail with an error of its own.
    image.preprocess = lambda payload: payload and payload.path
    return image


def make_gallery(label: str, columns: int = 2, **options: Any) -> gr.Gallery:
    """Make a grid of results."""
    defaults = {"show_label": False, "buttons": BUTTONS, "elem_classes": "images"}
    return gr.Gallery(
        label=label,
        columns=columns,
        object_fit="contain",
        height="auto",
        interactive=False,
        **{**defaults, **options},
    )
