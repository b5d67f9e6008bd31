/** Small parts that several panels have. */
interface SegmentsProps<T extends string> {
  readonly label: string;
  readonly value: T;
  readonly options: Readonly<Record<T, string>>;
  onChange(to: T): void;
}

/** A choice of one of a few: buttons beside one another. */
export function Segments<T extends string>({ label, value, options, onChange }: SegmentsProps<T>) {
  return (
    <fieldset class="segments" aria-label={label}>
      {(Object.entries(options) as [T, string][]).map(([name, text]) => (
        <label key={name}>
          <input type="radio" name={label} checked={name === value} onChange={() => onChange(name)} />
          <span>{text}</span>
        </label>
      ))}
    </fieldset>
  );
}

/** Names of colours. */
export function Legend({ entries }: { readonly entries: readonly (readonly [name: string, colour: string])[] }) {
  return (
    <ul class="legend">
      {entries.map(([name, colour]) => (
        <li key={name}>
          <i style={{ background: colour }} />
          {name}
        </li>
      ))}
    </ul>
  );
}

/** The head of a table whose columns are texts. */
export function TableHead({ names }: { readonly names: readonly string[] }) {
  return (
    <thead>
      <tr>
        {names.map((name) => (
          <th key={name} scope="col">
            {name}
          </th>
        ))}
      </tr>
    </thead>
  );
}
