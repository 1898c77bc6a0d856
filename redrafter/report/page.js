// Tokens: one stop of the tab key per text, arrows within it; what is known of one is said below.
for (const text of document.querySelectorAll(".tokens")) {
  const tokens = [...text.querySelectorAll("span")];
  const below = text.nextElementSibling;
  const show = (i) => { below.textContent = tokens[i].dataset.say; };
  const go = (i) => {
    const next = Math.max(0, Math.min(tokens.length - 1, i));
    for (const token of tokens) token.tabIndex = -1;
    tokens[next].tabIndex = 0;
    tokens[next].focus();
  };
  tokens.forEach((token, i) => {
    token.dataset.say = token.title;
    token.removeAttribute("title");
    token.tabIndex = i === 0 ? 0 : -1;
    token.addEventListener("mouseenter", () => show(i));
    token.addEventListener("focus", () => show(i));
    token.addEventListener("click", () => go(i));
  });
  text.addEventListener("keydown", (event) => {
    const i = tokens.indexOf(document.activeElement);
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (i < 0 || to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(to);
  });
}
