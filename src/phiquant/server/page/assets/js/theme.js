// Runs before the first paint, so that a chosen appearance does not flash in the other one.
try {
  const chosen = JSON.parse(localStorage.getItem("phiquant.theme"));
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing follows the system.
}
