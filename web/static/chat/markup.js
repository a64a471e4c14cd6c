// The server's HTML of an answer, put into the page. The server makes it of Markdown without HTML;
// what is not of the kind that Markdown makes is left out here once more.

const TAGS = new Set(
  "p br hr em strong del code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 a table thead tbody tr th td".split(" "),
);
const ATTRIBUTES = {
  href: (value) => /^(https?:|mailto:)/i.test(value),
  rel: () => true,
  target: (value) => value === "_blank",
  start: (value) => /^\d+$/.test(value),
  class: (value) => /^(language-[\w+#-]+|left|right|center)$/.test(value),
};

/** Show `html` in an element, where only the blocks that differ from those shown are exchanged. */
export function showHtml(element, html) {
  const template = document.createElement("template"); // inert: nothing in it is run or loaded
  template.innerHTML = html;
  keepMarkdown(template.content);
  const [shown, wanted] = [[...element.childNodes], [...template.content.childNodes]];
  let same = 0;
  while (same < shown.length && same < wanted.length && shown[same].isEqualNode(wanted[same])) same += 1;
  for (const node of shown.slice(same)) node.remove();
  element.append(...wanted.slice(same));
}

function keepMarkdown(parent) {
  for (const node of [...parent.childNodes]) {
    if (node.nodeType === Node.TEXT_NODE) continue;
    if (!(node instanceof HTMLElement) || !TAGS.has(node.localName)) {
      node.remove();
      continue;
    }
    for (const { name, value } of [...node.attributes]) {
      if (!ATTRIBUTES[name]?.(value)) node.removeAttribute(name);
    }
    keepMarkdown(node);
  }
}
