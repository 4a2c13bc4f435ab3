// Runs before the first paint, so that the page does not flash in another theme.
(() => {
  const root = document.documentElement
  const ORDER = ['auto', 'light', 'dark']
  const SPOKEN = { auto: 'as the system', light: 'light', dark: 'dark' }
  let theme = 'auto'
  try { theme = localStorage.getItem('epd-theme') ?? 'auto' } catch { /* storage is switched off */ }
  if (!ORDER.includes(theme)) theme = 'auto'
  const show = () => {
    if (theme === 'auto') delete root.dataset.theme
    else root.dataset.theme = theme
    const button = document.getElementById('theme')
    if (button === null) return
    button.textContent = `Theme: ${theme}`
    button.setAttribute('aria-label', `Theme: ${SPOKEN[theme]}`)
  }
  show()
  document.addEventListener('DOMContentLoaded', () => {
    show()
    document.getElementById('theme').addEventListener('click', () => {
      theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length]
      try { localStorage.setItem('epd-theme', theme) } catch { /* for this visit only */ }
      show()
    })
  })
})()
