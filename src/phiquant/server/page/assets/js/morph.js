// Make one piece of the document like another by changing only what differs: selections, scroll positions and focus stay.

/** Give `current` the children of `wanted`, which is used up. */
function morphChildren(current, wanted) {
  let old = current.firstChild;
  for (const child of [...wanted.childNodes]) {
    if (old === null) {
      current.append(child);
      continue;
    }
    const next = old.nextSibling;
    morph(old, child);
    old = next;
  }
  while (old !== null) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
}

/** Make `old` like `wanted`, which is used up. */
export function morph(old, wanted) {
  if (old.isEqualNode(wanted)) return;
  // Formulas carry styles, which the page's security policy lets nobody set as attributes: they are replaced.
  if (old.nodeType !== wanted.nodeType || old.nodeName !== wanted.nodeName || old.localName === "math") {
    old.replaceWith(wanted);
  } else if (old.nodeType === Node.ELEMENT_NODE) {
    for (const { name } of [...old.attributes]) if (!wanted.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of wanted.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    morphChildren(old, wanted);
  } else if (wanted.data.startsWith(old.data)) {
    old.appendData(wanted.data.slice(old.data.length));
  } else {
    old.data = wanted.data;
  }
}
