package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

const (
	unreleased = "## [Unreleased]\n"
	repository = "https://" + rootPath
)

// heading is that of a version in the changelog.
var heading = regexp.MustCompile(`(?m)^## \[([^\]]+)\]`)

// changelog is CHANGELOG.md in parts.
type changelog struct {
	before     string // up to the heading of what is unreleased
	unreleased string // the section without its heading
	after      string
}

func readChangelog(dir string) (c changelog, err error) {
	raw, err := os.ReadFile(filepath.Join(dir, "CHANGELOG.md"))
	if err != nil {
		return c, err
	}
	before, rest, found := strings.Cut(string(raw), unreleased)
	if !found {
		return c, fmt.Errorf("CHANGELOG.md: no heading %q", strings.TrimSpace(unreleased))
	}
	end := len(rest)
	for _, next := range []*regexp.Regexp{heading, link} {
		if at := next.FindStringIndex(rest); at != nil {
			end = min(end, at[0])
		}
	}
	return changelog{before, rest[:end], rest[end:]}, nil
}

// link is the address of what is unreleased, at the end of the page.
var link = regexp.MustCompile(`(?m)^\[Unreleased\]: .*\n`)

// releaseChangelog turns what is unreleased into the section of a version.
func releaseChangelog(dir, version string, now time.Time) error {
	c, err := readChangelog(dir)
	if err != nil {
		return err
	}
	if last := heading.FindStringSubmatch(c.after); last != nil {
		if err := later(version, "v"+last[1]); err != nil {
			return err
		}
	}
	if !strings.Contains(c.unreleased, "\n- ") {
		return fmt.Errorf("CHANGELOG.md: nothing is listed under %s", strings.TrimSpace(unreleased))
	}
	if !link.MatchString(c.after) {
		return errors.New("CHANGELOG.md: the address of [Unreleased] is missing at the end")
	}
	number := strings.TrimPrefix(version, "v")
	after := link.ReplaceAllString(c.after, fmt.Sprintf("[Unreleased]: %s/compare/%s...main\n[%s]: %s/releases/tag/%s\n",
		repository, version, number, repository, version))
	text := c.before + unreleased + fmt.Sprintf("\n## [%s] - %s\n", number, now.Format(time.DateOnly)) + c.unreleased + after
	return os.WriteFile(filepath.Join(dir, "CHANGELOG.md"), []byte(text), 0o666)
}

// code is a code span of the changelog.
var code = regexp.MustCompile("`[^`]+`")

// names has the words of the code spans of what is unreleased.
func (c changelog) names() map[string]bool {
	words := make(map[string]bool)
	for _, span := range code.FindAllString(c.unreleased, -1) {
		for _, word := range regexp.MustCompile(`\w+`).FindAllString(span, -1) {
			words[word] = true
		}
	}
	return words
}
