/** The value of one sample in Prometheus text; 0 when a labelled sample is absent, undefined when the whole metric is. */
export function metric (text: string, name: string, labels: Readonly<Record<string, string>> = {}): number | undefined {
  const samples = text.split('\n').filter(line => line.startsWith(name + ' ') || line.startsWith(name + '{'))
  if (samples.length === 0) return text.includes(`# TYPE ${name} `) ? 0 : undefined
  const wanted = Object.entries(labels).map(([key, value]) => `${key}="${value}"`)
  const found = samples.find(line => wanted.every(pair => line.includes(pair)))
  return found === undefined ? 0 : Number(found.slice(found.lastIndexOf(' ') + 1))
}
