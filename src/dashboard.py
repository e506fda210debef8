"""Create a W&B workspace for a project: `python src/dashboard.py ENTITY --project unclip`."""

import json
import sys
from collections.abc import Sequence

from cli import Parser

STEP = "trainer/global_step"

# Prefix → title of a plot → its metrics; those of validation with their baselines.
PLOTS = {
    "validation": {
        "CLIP: recall": ["text_to_image_at_1", "image_to_text_at_1", "text_to_image_at_5"],
        "Prior: cosine": ["cosine", "cosine_text", "cosine_shuffled"],
        "Decoder: loss": ["loss"],
        "Upsamplers: PSNR": ["psnr", "psnr_bicubic"],
        "Upsamplers: gain over bicubic": ["psnr_gain"],
    },
    "train": {
        "Loss": ["loss"],
        "Loss by quartile of the timesteps": ["loss_q0", "loss_q1", "loss_q2", "loss_q3"],
        "Loss terms": ["mse", "vb"],
        "Gradient norm": ["gradient_norm"],
        "Learning rate": ["learning_rate"],
        "Images per second": ["images_per_second"],
        "Images": ["images"],
        "Memory (GiB)": ["memory_gib"],
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the workspace and print its URL, or print its specification."""
    parser = Parser(description=__doc__)
    parser.add_argument("entity", help="W&B user or team")
    parser.add_argument("--project", default="unclip", help="W&B project")
    parser.add_argument("--name", default="unclip", help="workspace name")
    parser.add_argument("--print", action="store_true", help="print it; no account is needed")
    options = parser.parse_args(arguments)
    try:
        workspace = build(options.entity, options.project, options.name)
    except ModuleNotFoundError as error:
        print(f"dashboard.py: {error.name} is missing: pip install -e '.[workspace]'")
        return 2
    if options.print:
        print(json.dumps(json.loads(workspace._to_model().model_dump_json()), indent=1))
        return 0
    workspace.save()
    print(workspace.url)
    return 0


def build(entity: str, project: str, name: str):
    """Build the workspace: validation, training, samples and the runs' settings."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as panels

    sections = {
        prefix.capitalize(): [
            panels.LinePlot(title=title, x=STEP, y=[f"{prefix}/{metric}" for metric in metrics])
            for title, metrics in plots.items()
        ]
        for prefix, plots in PLOTS.items()
    }
    sections["Samples"] = [panels.MediaBrowser(media_keys=["samples"], num_columns=1)]
    sections["Settings"] = [panels.RunComparer(diff_only="split")]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name=title, panels=content, is_open=title != "Settings")
            for title, content in sections.items()
        ],
        auto_generate_panels=True,  # for scores of evaluations, whose names depend on the protocol
    )


if __name__ == "__main__":
    sys.exit(main())
