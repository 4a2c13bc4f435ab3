/** The sum of the samples with these labels in Prometheus text; 0 when there is none, undefined when the whole metric is absent. */
export function metric (text: string, name: string, labels: Readonly<Record<string, string>> = {}): number | undefined {
  const samples = text.split('\n').filter(line => line.startsWith(name + ' ') || line.startsWith(name + '{'))
  if (samples.length === 0) return text.includes(`# TYPE ${name} `) ? 0 : undefined
  const wanted = Object.entries(labels).map(([key, value]) => `${key}="${value}"`)
  const found = samples.filter(line => wanted.every(pair => line.includes(pair)))
  return found.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(' ') + 1)), 0)
}
