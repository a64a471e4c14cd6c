"""Try a folder of `export.py --space` as the hub would run it: alone, in an empty environment.

    python export.py --space runs/space
    python -m tools.try_space runs/space

It copies the folder, makes a virtual environment, installs requirements.txt there with what the
hub's builder adds, starts app.py with the environment of a Space and a home that cannot be written,
asks by a browser, compares the answer with that of infer.py here, and removes it all. Takes
minutes, most of them pip's. Needs playwright and Chromium, as the tests of the web app do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import config as configs
import paths
import space
from data.examples import Example, read_examples
from errors import PhiSightError, run_main
from exports.space import REQUIREMENTS, pinned

CHROMIUM = "/usr/bin/chromium"
# Seen in the logs of Spaces: its builder names these beside requirements.txt, in one command.
BUILDER_ADDS = ("gradio[oauth]=={gradio}", "uvicorn>=0.14.0", "spaces")
WAIT = 180.0  # seconds for the first start, which compiles, and for an answer
ANSWERED = "#chat [data-testid=bot]"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = configs.Parser(prog="try_space.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what export.py --space wrote")
    parser.add_argument("--image", help="picture to ask about (default: the Space's first example)")
    parser.add_argument("--question", help="about it (default: that example's)")
    parser.add_argument("--screenshot", metavar="PNG", help="keep a picture of the page")
    parser.add_argument("--chromium", default=CHROMIUM, help="the browser (%(default)s)")
    return parser.parse_args(arguments)


def question_of(options: argparse.Namespace, folder: Path) -> Example:
    """What to ask. Raises `PhiSightError` where neither flags nor examples say it."""
    settings = space.found_in(folder)
    if settings is None:
        raise PhiSightError(f"{folder}: has no {space.FILE}; write it with export.py --space")
    if options.image and options.question:
        return Example(options.question, options.image)
    if not settings.examples:
        raise PhiSightError(f"{folder}: has no examples; give --image and --question")
    return read_examples(folder / settings.examples)[0]


def installed(folder: Path, environment: Path) -> Path:
    """The Python of a new environment with what a Space in `folder` asks for."""
    venv.create(environment, with_pip=True)
    python = environment / "bin/python"
    added = [package.format(gradio=pinned("gradio")) for package in BUILDER_ADDS]
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    done = subprocess.run([*pip, "-r", folder / REQUIREMENTS, *added], check=False)
    if done.returncode:
        raise PhiSightError(f"{folder / REQUIREMENTS}: pip could not install it; see above")
    return python


def started(python: Path, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """`python app.py` in the folder, and the address that it is reached at."""
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": "/dev/null/home",  # nobody can write there, whoever asks
        "PYTHONUNBUFFERED": "1",
        "SPACE_ID": "owner/name",
        "SPACE_HOST": "owner-name.hf.space",
        "GRADIO_SERVER_PORT": "0",
    }
    process = subprocess.Popen(
        [python, "app.py"], cwd=folder, env=environ, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http://" not in line:
        raise PhiSightError(f"{folder}: app.py did not start ({line.strip() or 'see above'})")
    print(line.strip())
    return process, f"http://127.0.0.1:{line.split('http://')[1].split()[0].rpartition(':')[2]}"


def asked_by_browser(address: str, asked: Example, options: argparse.Namespace) -> str:
    """What the page answers."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        page = browser.new_page(locale="en-GB")
        page.set_default_timeout(WAIT * 1000)
        page.goto(address)
        box = page.locator("#question textarea")
        box.wait_for()
        page.wait_for_timeout(1000)  # the first updates come in several messages
        page.locator("#question input[type=file]").set_input_files(asked.picture)
        page.locator("#question img").wait_for()
        box.fill(asked.question)
        box.press("Enter")
        page.locator("#note", has_text="tokens").wait_for()  # it tells of what has ended
        answer = page.locator(ANSWERED).inner_text()
        if options.screenshot:
            page.screenshot(path=options.screenshot)
        browser.close()
    return " ".join(answer.split())


def asked_here(run: str, asked: Example) -> str:
    """What infer.py of this project answers."""
    command = [sys.executable, "infer.py", f"--run={run}", f"--image={asked.picture}"]
    done = subprocess.run(
        [*command, f"--prompt={asked.question}"],
        cwd=paths.PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PhiSightError(f"infer.py: {done.stderr.strip()}")
    return " ".join(done.stdout.split())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    folder = Path(options.folder).absolute()
    asked = question_of(options, folder)
    settings = space.found_in(folder)
    assert settings is not None
    with tempfile.TemporaryDirectory(prefix="phisight-space-") as temporary:
        began = time.perf_counter()

        def tell(what: str) -> None:
            print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

        app = Path(shutil.copytree(folder, Path(temporary) / "app"))
        python = installed(app, Path(temporary) / "environment")
        tell(f"an empty environment with {REQUIREMENTS}")
        process, address = started(python, app)
        try:
            tell("app.py serves")
            answer = asked_by_browser(address, asked, options)
            tell(f"a browser asked {asked.question!r} and read {answer!r}")
        finally:
            process.terminate()
            process.wait(timeout=60)
        kept = folder / settings.run
        wanted = asked_here(str(kept) if kept.is_dir() else settings.run, asked)
        tell(f"infer.py says {wanted!r}; app.py ended with code {process.returncode}")
    if answer != wanted or process.returncode:
        raise PhiSightError(f"{folder}: the Space answers {answer!r}, infer.py {wanted!r}")
    print(f"{folder}: runs alone, and answers as infer.py does")
    return 0


if __name__ == "__main__":
    run_main(main)
