/**
 * What `promtool check metrics` says of a page, and what the formats ask for beyond that, so that tests need no promtool.
 *
 * @see https://prometheus.io/docs/practices/naming/
 * @see https://prometheus.io/docs/specs/om/open_metrics_spec/
 */

interface Family { readonly name: string, readonly help: string, readonly type: string, readonly samples: Sample[] }
interface Sample { readonly name: string, readonly labels: ReadonlyMap<string, string>, readonly value: number, readonly exemplar: string | undefined }

const LABELS = String.raw`\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\n"])*",?)*)\}`
const NUMBER = String.raw`[+-]?(?:Inf|NaN|\d+(?:\.\d+)?(?:e[+-]?\d+)?)`
const SAMPLE = new RegExp(String.raw`^([a-zA-Z_:][\w:]*)(?:${LABELS})? (${NUMBER})(?: # (\{trace_id="[0-9a-f]{32}"\} ${NUMBER} ${NUMBER}))?$`)
const ABBREVIATIONS = /_(s|ms|us|ns|sec|min|hr|day|b|kb|mb|gb|tb|pb|m|h|d)$/
const NOT_BASE = /_(milliseconds?|microseconds?|nanoseconds?|minutes?|hours?|days?|bits?|kilobytes?|megabytes?|gigabytes?|percent|percentage|celcius)(_|$)/
const TYPES = /_(counter|gauge|histogram|summary)(_|$)/

/** @returns each fault, empty for a good page */
export function promlint (page: string): string[] {
  const open = page.endsWith('# EOF\n')
  const faults: string[] = []
  const families = read(page, faults)
  for (const family of families) faults.push(...faultsOf(family, open).map(fault => `${family.name}: ${fault}`))
  const names = families.map(({ name }) => name)
  if (new Set(names).size !== names.length) faults.push('a family comes twice')
  return faults
}

function read (page: string, faults: string[]): Family[] {
  const families: Family[] = []
  const lines = page.split('\n')
  if (lines.pop() !== '') faults.push('the last line does not end')
  let help: [name: string, text: string] | undefined
  for (const line of lines) {
    const [, kind, name, text] = /^# (HELP|TYPE|UNIT) (\S+) (.+)$/.exec(line) ?? []
    if (kind === 'HELP') help = [name!, text!]
    else if (kind === 'TYPE') {
      families.push({ name: name!, help: help?.[0] === name ? help![1] : '', type: text!, samples: [] })
    } else if (kind === 'UNIT') {
      if (!name!.endsWith('_' + text!)) faults.push(`${name} does not end in its unit ${text}`)
    } else if (line !== '# EOF') {
      const found = SAMPLE.exec(line)
      if (found === null) faults.push(`not a sample: ${line}`)
      else families.at(-1)!.samples.push({ name: found[1]!, labels: labelsOf(found[2] ?? ''), value: Number(found[3]!.replace('Inf', 'Infinity')), exemplar: found[4] })
    }
  }
  return families
}

function labelsOf (text: string): ReadonlyMap<string, string> {
  return new Map([...text.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name!, value!]))
}

function faultsOf ({ name, help, type, samples }: Family, open: boolean): string[] {
  const faults: string[] = []
  const check = (good: boolean, fault: string): void => { if (!good) faults.push(fault) }
  const total = name.endsWith('_total')
  check(help !== '', 'no help text')
  check(type !== 'counter' || total !== open, 'a counter ends in "_total", in OpenMetrics in its samples only')
  check(type === 'counter' || type === 'untyped' || type === 'unknown' || !total, 'what is no counter does not end in "_total"')
  check(type === 'histogram' || !/_(bucket|count|sum)$/.test(name), 'ends as parts of histograms do')
  check(!TYPES.test(name), 'the type is in the name')
  check(!/[A-Z:]/.test(name), 'capitals or colons')
  check(!ABBREVIATIONS.test(name.replace(/_total$/, '')), 'abbreviates a unit')
  check(!NOT_BASE.test(name), 'no base unit')
  const keys = new Set<string>()
  for (const sample of samples) {
    const suffixes = type === 'histogram' ? ['_bucket', '_sum', '_count'] : type === 'counter' && open ? ['_total'] : ['']
    check(suffixes.some(suffix => sample.name === name + suffix), `has a sample ${sample.name}`)
    check(![...sample.labels.keys()].some(label => /[A-Z]/.test(label) || label.startsWith('__') || label === 'quantile' || (label === 'le' && type !== 'histogram')), 'a label is reserved or has capitals')
    check(sample.exemplar === undefined || (open && sample.name.endsWith('_bucket')), 'an exemplar where none may be')
    check(type !== 'counter' || sample.value >= 0, 'a counter below 0')
    const key = `${sample.name} ${[...sample.labels].sort().join()}`
    check(!keys.has(key), `a sample comes twice: ${key}`)
    keys.add(key)
  }
  if (type === 'histogram') faults.push(...histogramFaults(samples))
  return faults
}

function histogramFaults (samples: readonly Sample[]): string[] {
  const faults: string[] = []
  const series = new Map<string, Sample[]>()
  for (const sample of samples) {
    const key = [...sample.labels].filter(([label]) => label !== 'le').sort().join()
    series.set(key, [...series.get(key) ?? [], sample])
  }
  for (const [key, all] of series) {
    const buckets = all.filter(({ name }) => name.endsWith('_bucket'))
    const bounds = buckets.map(({ labels }) => Number(labels.get('le')!.replace('+Inf', 'Infinity')))
    if (bounds.some((bound, i) => i > 0 && bound <= bounds[i - 1]!) || bounds.at(-1) !== Infinity) faults.push(`bounds of ${key} do not rise to +Inf`)
    if (buckets.some(({ value }, i) => i > 0 && value < buckets[i - 1]!.value)) faults.push(`buckets of ${key} fall`)
    if (buckets.at(-1)?.value !== all.find(({ name }) => name.endsWith('_count'))?.value) faults.push(`buckets and count of ${key} differ`)
    if (!all.some(({ name }) => name.endsWith('_sum'))) faults.push(`${key} has no sum`)
    for (const { exemplar } of buckets) if (exemplar !== undefined && !/^\{[^}]*\} \S+ \d+\.\d{3}$/.test(exemplar)) faults.push(`bad exemplar ${exemplar}`)
  }
  return faults
}
