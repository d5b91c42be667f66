// Options of select elements: by value, and by the names that other tools use. Knows no settings.

/** Adds an option; `aliases` are other names that `selectOption` accepts. */
export function addOption(parent, value, { label = value, aliases = [] } = {}) {
  const option = new Option(label, value);
  option.dataset.aliases = [value, ...aliases].join("\n").toLowerCase();
  parent.append(option);
}

export function fillSelect(select, values) {
  select.replaceChildren();
  for (const value of values) addOption(select, value);
}

/** Adds options under a heading. */
export function addGroup(select, label, values, describe) {
  if (!values.length) return;
  const group = document.createElement("optgroup");
  group.label = label;
  for (const value of values) addOption(group, value, { label: describe(value) });
  select.append(group);
}

/** Selects an option by its value or an alias; returns whether there is one. */
export function selectOption(select, value) {
  if (value === undefined) return false;
  const sought = String(value).toLowerCase();
  const option = [...select.options].find(
    (option) => option.value === value || option.dataset.aliases?.split("\n").includes(sought),
  );
  if (option) select.value = option.value;
  return Boolean(option);
}
