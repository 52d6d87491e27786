//go:build !race

package acceptq

const raceDetector = false
