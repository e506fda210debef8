"""Open a page that generates and edits images with a bundle: `make app`."""

import os
import sys
from collections.abc import Sequence

from cli import Parser, user_message
from cli.sample import add_loading


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C; return 0, or 2 after a user error."""
    parser = Parser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address that the page is served at")
    parser.add_argument("--port", type=int, help="port; default: the first free one from 7860")
    add_loading(parser.add_argument)
    args = parser.parse_args(arguments)
    from cli.page import Page  # imports torch, which would slow down --help

    try:
        page = Page(args)
    except Exception as error:
        print(f"app.py: {user_message(error)}", file=sys.stderr)
        return 2
    # Gradio reads these when it is imported. Its files are deleted with those of the page.
    os.environ |= {"GRADIO_TEMP_DIR": str(page.folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        from cli.page_layout import serve

        serve(page, args.host, args.port)
    except (ImportError, OSError) as error:  # no Gradio, or no free port
        print(f"app.py: {error}; `make app` installs what the page needs", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    finally:
        page.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
