/** Light, dark, or what the system says; the choice outlives the page. */

const KEY = "mimray.theme";
const CHOICES = ["auto", "light", "dark"];

/** @returns {string} one of `auto`, `light`, `dark` */
function stored() {
  try {
    const found = localStorage.getItem(KEY);
    return CHOICES.includes(found) ? found : "auto";
  } catch {
    return "auto"; // storage may be forbidden
  }
}

/** @param {string} choice */
function apply(choice) {
  document.documentElement.dataset.theme = choice;
}

apply(stored());

/**
 * Makes a button go through the themes.
 * @param {HTMLButtonElement} button
 */
export function bindTheme(button) {
  const label = () => {
    button.textContent = `Theme: ${document.documentElement.dataset.theme}`;
  };
  label();
  button.addEventListener("click", () => {
    const now = CHOICES.indexOf(document.documentElement.dataset.theme);
    const next = CHOICES[(now + 1) % CHOICES.length];
    apply(next);
    try {
      localStorage.setItem(KEY, next);
    } catch {
      // Then it holds until the page is closed.
    }
    label();
  });
}
