// The page keeps its end in view while an answer grows, until the reader scrolls up.

const NEAR = 80; // pixels from the end that count as being there

/** `growing`: elements whose height changes; `newest` is the button that goes to the end. */
export class Follow {
  constructor(growing, newest) {
    this.newest = newest;
    this.isFollowing = true;
    this.isOn = false;
    this.isEmpty = true; // then it is read from its top
    this.last = 0;
    const sizes = new ResizeObserver(() => this.isOn && this.keep());
    for (const element of growing) sizes.observe(element);
    addEventListener("scroll", () => this.isOn && this.#scrolled(), { passive: true });
    newest.addEventListener("click", () => this.toEnd());
  }

  get #page() {
    return document.scrollingElement;
  }

  get #left() {
    const { scrollHeight, clientHeight, scrollTop } = this.#page;
    return scrollHeight - clientHeight - scrollTop;
  }

  #scrolled() {
    const { scrollTop } = this.#page;
    if (this.#left <= NEAR) this.isFollowing = true;
    else if (scrollTop < this.last) this.isFollowing = false; // upwards: by the reader
    this.last = scrollTop;
    this.newest.hidden = this.#left <= NEAR || this.isEmpty;
  }

  /** Go to the end if that is where the reader is. */
  keep() {
    if (this.isFollowing) this.toEnd();
    else this.newest.hidden = this.#left <= NEAR || this.isEmpty;
  }

  /** The room is shown: at the place where the reader left it. */
  begin() {
    if (this.isOn) return;
    this.isOn = true;
    if (this.isFollowing) this.toEnd();
    else this.#page.scrollTop = this.last;
  }

  /** Another room is shown, from its top. */
  end() {
    this.isOn = false;
    this.#page.scrollTop = 0;
  }

  toEnd() {
    this.isFollowing = true;
    this.#page.scrollTop = this.isEmpty ? 0 : this.#page.scrollHeight;
    this.last = this.#page.scrollTop;
    this.newest.hidden = true;
  }
}
